"""Gradients of a loss by the gates and states of every time step."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_scratch_lstm import recurrence
from keras_scratch_lstm.experiments import loop
from keras_scratch_lstm.tracing import GateTrace
from keras_scratch_lstm.tracing.trace import ARRAYS


def trace_gradients(
    model_or_layer: Any,
    inputs: Any,
    targets: Any,
    loss: str | Callable[[Any, Any], Any] | None = None,
    layer: Any = None,
) -> GateTrace:
    """Compute the gradient of a loss by each gate and state at every time step.

    `trace.h[:, t]` is dL/dh_t, through the output at time step `t` and through all
    later time steps; likewise for `c`, `i`, `f`, `o` and `c_tilde`. The norms over
    time show how far the gradient reaches back; see `plotting.plot_gradients`.

    The model runs as in `run_with_edits`. Needs the TensorFlow, JAX or PyTorch
    backend.

    Args:
        model_or_layer: See `trace_gates`.
        inputs: See `run_with_edits`.
        targets: The targets of the model.
        loss: A loss by name, or a function `(y_true, y_pred)` such as a Keras loss.
            Its mean is taken. Default: `None`, the compiled loss.
        layer: See `run_with_edits`. It may also be a `keras.layers.SimpleRNN`, by
            name or as the layer, for comparison.

    Returns:
        A `GateTrace` of gradients, NaN at masked time steps. For a `SimpleRNN`,
        which has only `h`, the other arrays are NaN.

    Raises:
        ValueError: If an argument is invalid.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import trace_gradients
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(1)]
    ... )
    >>> x, y = np.ones((2, 10, 8)), np.zeros((2, 1))
    >>> gradients = trace_gradients(model, x, y, "mse")
    >>> np.linalg.norm(gradients.h, axis=-1).shape  # |dL/dh_t|
    (2, 10)
    """
    call = loop.find_call(model_or_layer, inputs, layer, simple_rnn=True)
    loss = loop.loss_function(loss, call.model, "loss")
    targets = keras.tree.map_structure(ops.convert_to_tensor, targets)
    batch, time, units = call.shape
    names = ("h",) if call.c is None else ARRAYS

    def loss_of(tensors):
        added = ops.unstack(tensors[0])

        def visit(name, step, t):
            return getattr(step, name) + added[t][names.index(name)]

        outputs, _ = loop.run(call, visit)
        return loss(targets, outputs)

    # Adding zeros to an array gives the gradient by that array.
    zeros = ops.zeros((time, len(names), batch, units), call.layer.cell.compute_dtype)
    (gradients,) = recurrence.gradient(loss_of, [zeros])
    steps = {
        t: loop.Step(**dict(zip(names, gradient, strict=True)))
        for t, gradient in enumerate(ops.unstack(gradients))
    }
    return loop.to_trace(call, steps)
