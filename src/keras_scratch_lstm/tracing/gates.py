"""`trace_gates`: the gates and states of a trained LSTM."""

from keras_scratch_lstm._types import Data, Layer, Model, Path
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.call import run
from keras_scratch_lstm.observing.inputs import read
from keras_scratch_lstm.observing.loop import ARRAYS
from keras_scratch_lstm.tracing.trace import GateTrace, join


def trace_gates(
    model: Model | Path,
    inputs: Data,
    *,
    layer: Layer | None = None,
    call_index: int = 0,
    batch_size: int = 32,
    batches: int | None = 1,
) -> GateTrace:
    """Trace the gates and states of an LSTM for every unit at every time step.

    This works for trained models, which are not modified. The layer may be a
    `ScratchLSTM`, a `keras.layers.LSTM`, or a `keras.layers.RNN` with a
    `ScratchLSTMCell` (or a custom subclass) or a `keras.layers.LSTMCell`, alone, in
    a `keras.layers.Bidirectional`, or anywhere in a model.

    The model runs in inference mode. Stateful layers start every batch from their
    current states, which do not change.

    Args:
        model: A built Keras model or layer, or the path of a file of Keras 2 or 3.
        inputs: Inputs of the model or layer: an array, a tensor or a nested list, a
            list or dict of these, or a dataset of batches with or without targets:
            a `tf.data.Dataset`, a `keras.utils.PyDataset` or another iterable.
            The padding of a ragged tensor is masked. A batch may be smaller than
            the model's fixed batch size; sample `k` then starts from row `k` of
            a stateful layer's states.
        layer: Which LSTM to trace if the model has several: its name, its index
            among the model's LSTMs, or the layer; also one of the two layers of a
            `Bidirectional`. Default: `None`.
        call_index: Integer, which call of the layer to trace if the model calls it
            several times. Default: 0, the first.
        batch_size: Positive integer, the number of samples to run at a time. A
            model with a `time_major` layer runs a batch at once. Default: 32.
        batches: Positive integer, how many batches of a dataset to trace, or `None`
            for all. If their lengths differ, the padding is masked. Default: 1.

    Returns:
        A `GateTrace`. For a `Bidirectional` layer, it is the trace of the forward
        layer, and its attribute `backward` that of the backward layer.

    Raises:
        ValueError: If the model has no LSTM, or has several and `layer` is not
            given, or if an argument is invalid.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import trace_gates
    >>> model = keras.Sequential([
    ...     keras.Input((None,), dtype="int32"),
    ...     keras.layers.Embedding(28, 8),
    ...     keras.layers.LSTM(16, name="lstm"),
    ...     keras.layers.Dense(28),
    ... ])
    >>> trace = trace_gates(model, np.array([[3, 1, 4, 1, 5]]))
    >>> trace.f.shape
    (1, 5, 16)
    """
    model, lstms = models.select(model, layer)
    data = read(model, inputs, batch_size=batch_size, batches=batches)
    # What follows the layer may reject other lengths, as `Flatten` and `Dense` do.
    options = {"record": ARRAYS, "call_index": call_index, "needs_outputs": False}
    found = [run(model, batch, lstms, **options)[1] for batch in data]
    return join(found, lstms, GateTrace)
