"""The private names of Keras that the package needs; no other module uses any.

`keras.layers.RNN` prepares dropout masks only for a `DropoutRNNCell`, and a metric is
not passed the mask that `get_keras_mask` returns.
Only a `StatelessScope` makes variables without values.
"""

import contextlib

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

__all__ = [
    "DropoutRNNCell",
    "all_layers",
    "compiled_loss",
    "compiled_losses",
    "deferred_variables",
    "get_keras_mask",
    "initialize",
    "is_deferred",
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


def operation(tensor):
    """Return the layer or operation that a symbolic tensor is an output of."""
    return tensor._keras_history.operation


@contextlib.contextmanager
def deferred_variables():
    """Make variables that have a shape, and no value before `initialize`.

    Yields the list of these variables.
    """
    key, created = "uninitialized_variables", []
    before = global_state.get_global_attribute(key)
    global_state.set_global_attribute(key, created)
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield created
    finally:
        global_state.set_global_attribute(key, before)


def is_deferred(variable):
    """Whether a variable has no value yet."""
    return variable._value is None


def initialize(variable, value=None):
    """Give a deferred variable a value, by default that of its initializer."""
    if value is not None:
        variable._initializer = lambda shape, dtype: keras.ops.cast(value, dtype)
    variable._deferred_initialize()


def minimize(metric):
    """Declare that lower is better, for `mode="auto"` of `EarlyStopping` and others."""
    metric._direction = "down"


def compiled_loss(model):
    """Return the function `(y_true, y_pred)` of a compiled model's loss, or `None`."""
    return getattr(model, "_compile_loss", None)


def compiled_losses(model):
    """Return the losses of a compiled model: tuples `(path, loss, weight, name)`."""
    return getattr(model._compile_loss, "_flat_losses", None) or []
