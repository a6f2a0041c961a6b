"""The private names of Keras that the package needs; no other module uses any.

`keras.layers.RNN` prepares dropout masks only for a `DropoutRNNCell`, `lstm` is the
binding of cuDNN, and a metric is not passed the mask that `get_keras_mask` returns.
"""

from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

__all__ = [
    "DropoutRNNCell",
    "all_layers",
    "compiled_loss",
    "compiled_losses",
    "get_keras_mask",
    "lstm",
    "minimize",
    "operation",
    "set_keras_mask",
    "sublayers",
]


def sublayers(layer):
    """Return the layers within a layer, which `model.layers` has for models only."""
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(layer):
    """Return a layer and all layers within it."""
    return layer._flatten_layers()


def lstm(*args, **kwargs):
    """Run Keras's binding of cuDNN on TensorFlow."""
    from keras.src.backend.tensorflow.rnn import lstm

    return lstm(*args, **kwargs)


def operation(tensor):
    """Return the layer or operation that a symbolic tensor is an output of."""
    return tensor._keras_history.operation


def minimize(metric):
    """Declare that lower is better, for `mode="auto"` of `EarlyStopping` and others."""
    metric._direction = "down"


def compiled_loss(model):
    """Return the function `(y_true, y_pred)` of a compiled model's loss, or `None`."""
    return getattr(model, "_compile_loss", None)


def compiled_losses(model):
    """Return the losses of a compiled model: tuples `(path, loss, weight, name)`."""
    return getattr(model._compile_loss, "_flat_losses", None) or []
