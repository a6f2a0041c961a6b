"""The names that Keras has but does not export, all in this one place.

- `DropoutRNNCell`: `keras.layers.RNN` draws dropout masks ahead of its loop
  only for cells of this class.
- `lstm`: Keras's binding of cuDNN's LSTM.
- `get_keras_mask`: a metric is not handed the mask of the predictions.
"""

from keras.src.backend import get_keras_mask, lstm
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

__all__ = ["DropoutRNNCell", "get_keras_mask", "lstm"]
