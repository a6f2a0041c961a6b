"""Trace the gates of a trained LSTM."""

from typing import Any

import numpy as np

from keras_scratch_lstm.tracing import capture, replay
from keras_scratch_lstm.tracing.inputs import read_batches
from keras_scratch_lstm.tracing.trace import GateTrace, Saturation

__all__ = ["GateTrace", "Saturation", "trace_gates"]


def trace_gates(
    model_or_layer: Any,
    inputs: Any,
    layer: Any = None,
    batch_size: int = 32,
    batches: int | None = 1,
) -> GateTrace:
    """Trace the gates and states of an LSTM for every unit at every time step.

    This works for trained models, which are not modified. The layer may be a
    `ScratchLSTM`, a `keras.layers.LSTM`, or a `keras.layers.RNN` with a
    `ScratchLSTMCell` (or a custom subclass) or a `keras.layers.LSTMCell`, alone, in
    a `keras.layers.Bidirectional`, or anywhere in a model.

    The model runs in inference mode up to the traced layer. If it calls the layer
    several times, the first call is traced. Stateful layers start every batch from
    their current states, which do not change.

    Args:
        model_or_layer: A built Keras model or layer, or the path of a file
            of Keras 2 or 3.
        inputs: Inputs of the model or layer: an array, a tensor or a nested list, a
            list or dict of these, or a dataset of batches with or without targets:
            a `tf.data.Dataset`, a `keras.utils.PyDataset` or another iterable.
            The padding of a ragged tensor is masked. A batch may be smaller than
            the model's fixed batch size; sample `k` then starts from row `k` of
            a stateful layer's states.
        layer: Which LSTM to trace if the model has several: its name, its index
            among the model's LSTMs, or the layer; also one of the two layers of a
            `Bidirectional`. Default: `None`.
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
    model = capture.load(model_or_layer)
    target, lstms = capture.find_lstms(model, layer)
    capture.check_built(model, lstms)
    parts: dict[Any, list[Any]] = {lstm: [] for lstm in lstms}
    stateful = capture.is_stateful(model)
    for batch in read_batches(inputs, batches, stateful=stateful):
        for calls in capture.capture_calls(model, target, batch, batch_size):
            for lstm, arguments in calls.items():
                if lstm in parts:
                    parts[lstm].append(replay.run(lstm, **arguments))
    trace: Any = None
    for lstm in reversed(lstms):
        trace = GateTrace(**_join(parts[lstm]), layer=lstm.name, backward=trace)
    return trace


def _join(parts):
    """Concatenate the arrays of all batches, padded to the same length."""
    time = max(part["h"].shape[1] for part in parts)
    if any("mask" in part or part["h"].shape[1] < time for part in parts):
        for part in parts:
            part.setdefault("mask", np.ones(part["h"].shape[:2], bool))

    def pad(values):
        width = [(0, 0), (0, time - values.shape[1]), (0, 0)][: values.ndim]
        fill = False if values.dtype == bool else np.nan
        return np.pad(values, width, constant_values=fill) if width[1][1] else values

    joined = {}
    for name in list(parts[0]):
        # Releasing each part keeps the peak memory near the size of the result.
        values = [pad(part.pop(name)) for part in parts]
        joined[name] = values[0] if len(values) == 1 else np.concatenate(values)
    return joined
