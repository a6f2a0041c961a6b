"""Conversion from and to Keras and torch; from TensorFlow Addons and Keras 2."""

from keras_scratch_lstm.convert.addons import from_addons
from keras_scratch_lstm.convert.keras import to_builtin, to_scratch
from keras_scratch_lstm.convert.keras2 import load_keras2, load_keras2_weights
from keras_scratch_lstm.convert.torch import from_torch, to_torch

__all__ = [
    "from_addons",
    "from_torch",
    "load_keras2",
    "load_keras2_weights",
    "to_builtin",
    "to_scratch",
    "to_torch",
]
