"""Conversion to and from Keras's built-in LSTM and `torch.nn.LSTM`."""

from keras_scratch_lstm.convert.keras import to_builtin, to_scratch
from keras_scratch_lstm.convert.torch import from_torch, to_torch

__all__ = ["from_torch", "to_builtin", "to_scratch", "to_torch"]
