"""Trace the gates of a trained LSTM."""

from typing import Any

import numpy as np

from keras_scratch_lstm.tracing import capture, replay
from keras_scratch_lstm.tracing.trace import GateTrace, Saturation

__all__ = ["GateTrace", "Saturation", "trace_gates"]


def trace_gates(
    model_or_layer: Any, inputs: Any, layer: Any = None, batch_size: int = 32
) -> GateTrace:
    """The gates and states of an LSTM, for every unit at every step.

    It works for models that are trained already: nothing is changed and
    nothing retrained. The layer may be a `ScratchLSTM`, a
    `keras.layers.LSTM`, or a `keras.layers.RNN` over a `ScratchLSTMCell` or a
    `keras.layers.LSTMCell`; its cell may be of a subclass of `ScratchLSTMCell`
    with gates of its own. It may stand alone, or in a Sequential, Functional,
    nested or subclassed model, and it may be wrapped in
    `keras.layers.Bidirectional`.

    The model runs up to the traced layer, in inference mode: nothing is
    dropped out. A stateful layer is traced from the states that it has, and
    keeps them, as do all others. Where a model calls the layer several times,
    it is the first call that is traced.

    Long inputs are computed `batch_size` samples and some hundred to thousand
    steps at a time, so that on the way there, no more than that is held beside
    the result. (But the layers before the traced one see all steps of a batch.)

    Args:
        model_or_layer: A Keras model, or the layer itself; built.
        inputs: What the model or layer takes: an array or tensor, or a list or
            dict of some, the samples first. (For a `time_major` layer itself,
            the time first.)
        layer: The layer's name, or the layer, where the model has several. Of
            a `Bidirectional`, the name or one of its two layers may be given.
            Default: `None`.
        batch_size: Positive integer, how many samples to run at a time. A
            model with stateful or `time_major` layers runs all of them
            together. Default: 32.

    Returns:
        A `GateTrace`: `i`, `f`, `o`, `c_tilde`, `c` and `h`, each an array of
        shape `(batch, time, units)`, for all samples, the steps in the order of
        the input. For `Bidirectional`, it is that of the forward layer, and
        its `backward` is that of the other.

    Raises:
        ValueError: There is no LSTM to trace, or no telling which, or the
            inputs do not fit; the message names the candidates.

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
    target, lstms = capture.find_lstms(model_or_layer, layer)
    for part in (model_or_layer, *(lstm.cell for lstm in lstms)):
        if not part.built:
            raise ValueError(
                f"`model_or_layer` is {model_or_layer.name!r}, which is not built yet; "
                "expected one that has its weights."
            )
    arrays: dict[Any, dict[str, np.ndarray]] = {lstm: {} for lstm in lstms}
    for first, size, samples, calls in capture.calls_of(
        model_or_layer, target, inputs, batch_size
    ):
        for lstm, whole in arrays.items():
            part = replay.run(lstm, **calls[lstm])
            rows, time = part["h"].shape[:2]
            if size == samples:
                arrays[lstm] = part
                continue
            # A model that folds an axis into the batch has several rows a sample.
            fold = rows // size
            if rows != fold * size or time != whole.get("h", part["h"]).shape[1]:
                raise ValueError(
                    f"`inputs` reach {target.name!r} with a number of steps that "
                    "changes from batch to batch; expected a `batch_size` that takes "
                    "all at once."
                )
            replay.put(whole, part, 0, first * fold, samples * fold)
    trace: Any = None
    for lstm, whole in reversed(arrays.items()):
        trace = GateTrace(**whole, layer=lstm.name, backward=trace)
    return trace
