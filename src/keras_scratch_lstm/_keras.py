"""Keras names that are not part of its public API; no other module uses any.

- `DropoutRNNCell`: `keras.layers.RNN` prepares dropout masks only for its subclasses.
- `lstm`: Keras's binding of cuDNN's LSTM.
- `get_keras_mask`: a metric is not passed the mask of the predictions.
"""

from keras.src.backend import get_keras_mask, lstm
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

__all__ = [
    "DropoutRNNCell",
    "get_keras_mask",
    "lstm",
    "own_variables",
    "sublayers",
]


def sublayers(layer, recursive=False):
    """Return the layers within a layer, which `model.layers` has for models only."""
    return layer._flatten_layers(include_self=False, recursive=recursive)


def own_variables(layer):
    """Return the variables of a layer, without those of its sublayers and seeds."""
    return layer._trainable_variables + layer._non_trainable_variables
