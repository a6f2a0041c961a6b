"""The private names of Keras that the package needs; no other module uses any.

`keras.layers.RNN` prepares dropout masks only for a `DropoutRNNCell`, `lstm` is the
binding of cuDNN, and a metric is not passed the mask that `get_keras_mask` returns.
"""

from keras.src.backend import get_keras_mask, lstm
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

__all__ = [
    "DropoutRNNCell",
    "compiled_losses",
    "get_keras_mask",
    "lstm",
    "minimize",
    "sublayers",
]


def sublayers(layer, recursive=False):
    """Return the layers within a layer, which `model.layers` has for models only."""
    return layer._flatten_layers(include_self=False, recursive=recursive)


def minimize(metric):
    """Declare that lower is better, for `mode="auto"` of `EarlyStopping` and others."""
    metric._direction = "down"


def compiled_losses(model):
    """Return the losses of a compiled model: tuples `(path, loss, weight, name)`."""
    return getattr(model._compile_loss, "_flat_losses", None) or []
