"""The names that Keras has but does not export, all in this one place.

- `DropoutRNNCell`: `keras.layers.RNN` draws dropout masks ahead of its loop
  only for cells of this class.
- `lstm`: Keras's binding of cuDNN's LSTM.
- `get_keras_mask`: a metric is not handed the mask of the predictions.
- `Variable._autocast`, in `keep_dtype`: to be chosen only by whoever creates a
  variable, which for the states of an RNN is Keras.
"""

from keras.src.backend import get_keras_mask, lstm
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

__all__ = ["DropoutRNNCell", "get_keras_mask", "keep_dtype", "lstm"]


def keep_dtype(variable):
    """Has a variable read and written in its own dtype under mixed precision.

    On torch, Keras casts it into a copy first, and then assigns to that copy.
    """
    variable._autocast = False
