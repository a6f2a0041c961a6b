"""Gradients of a loss by the gates and states of every time step."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation, recurrence
from keras_scratch_lstm._types import Data, Layer, Model, Path
from keras_scratch_lstm.experiments.outputs import (
    loss_function,
    to_targets,
)
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.call import (
    crop_arrays,
    observed_arrays,
    result_dtype,
    run,
)
from keras_scratch_lstm.observing.inputs import read
from keras_scratch_lstm.observing.loop import ARRAYS, Map
from keras_scratch_lstm.tracing.trace import Gradients, join


def trace_gradients(
    model: Model | Path,
    inputs: Data,
    targets: Data = None,
    *,
    loss: str | Callable[[Any, Any], Any] | None = None,
    layer: Layer | None = None,
    call_index: int = 0,
    batch_size: int = 1024,
    batches: int | None = 1,
) -> Gradients:
    """Compute the gradient of a loss by each gate and state at every time step.

    `gradients.h[:, t]` is dL/dh_t, through the output at time step `t` and through
    all later time steps; likewise for `c`, `i`, `f`, `o` and `c_tilde`. It is the
    total derivative, through all that the cell computes from the array; see
    `ScratchLSTMCell.observe`. The norms over time show how far the gradient reaches
    back; see `plotting.plot_gradients`.

    The model runs in inference mode and is not changed. Needs the TensorFlow, JAX or
    PyTorch backend.

    Arguments that are not listed are those of `trace_gates`.

    Args:
        targets: The targets of the model. Default: `None`, those of the dataset.
        loss: A loss by name, a Keras loss, or a function `(y_true, y_pred)`, of which
            the mean is taken, without masked time steps. Each batch has its own.
            Default: `None`, the compiled loss.
        layer: See `trace_gates`. It may also be a `keras.layers.SimpleRNN`, by name
            or as the layer, for comparison.

    Returns:
        `Gradients`, NaN at masked time steps. For a `SimpleRNN`, which has only `h`,
        the other arrays are NaN; so are those that a custom cell does not observe.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import trace_gradients
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(1)]
    ... )
    >>> x, y = np.ones((2, 10, 8)), np.zeros((2, 1))
    >>> gradients = trace_gradients(model, x, y, loss="mse")
    >>> np.linalg.norm(gradients.h, axis=-1).shape  # |dL/dh_t|
    (2, 10)
    """
    model, lstms = models.select(model, layer, simple_rnn=True)
    if isinstance(loss, keras.metrics.Metric):
        raise _validation.invalid("loss", loss, "a loss; metrics have no gradient")
    loss = loss_function(loss, model)
    data = read(model, inputs, targets, batch_size=batch_size, batches=batches)
    found = [_gradients(model, batch, lstms, loss, call_index) for batch in data]
    return join(found, lstms, Gradients)


def _gradients(model, batch, lstms, loss, call_index):
    targets, found = to_targets(batch.targets), {}

    def observe(lstm, shapes, mask):
        found[lstm] = shapes["h"], mask
        return {}

    with recurrence.no_gradients():
        run(model, batch, lstms, observe, (), call_index)
    places = [(lstm, name) for lstm in lstms for name in observed_arrays(lstm)]
    # The gradient by a map's `b` at 0 is that by the array.
    zeros = [ops.zeros(found[at][0], at.cell.compute_dtype) for at, _ in places]

    def loss_of(tensors):
        added = dict(zip(places, tensors, strict=True))

        def maps(lstm, shapes, mask):
            return {name: Map(None, b) for (at, name), b in added.items() if at is lstm}

        return loss(targets, run(model, batch, lstms, maps, (), call_index)[0])

    gradients = dict(zip(places, recurrence.gradient(loss_of, zeros), strict=True))
    results = {lstm: {} for lstm in lstms}
    for lstm, arrays in results.items():
        shape, mask = found[lstm]
        for name in ARRAYS:
            arrays[name] = np.full(shape, np.nan, result_dtype(lstm))
            if (lstm, name) in gradients:
                values = ops.cast(gradients[lstm, name], result_dtype(lstm))
                arrays[name][:] = ops.convert_to_numpy(values)
            if mask is not None:
                arrays[name][~mask] = np.nan
        arrays |= {} if mask is None else {"mask": mask}
    return crop_arrays(batch, results)
