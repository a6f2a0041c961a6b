"""A recurrent layer's loop over time, in which every array can be changed."""

import contextlib
import functools
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation, recurrence
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.per_gate import GATES, named_weights
from keras_scratch_lstm.tracing import GateTrace, capture
from keras_scratch_lstm.tracing.inputs import check_inputs
from keras_scratch_lstm.tracing.trace import ARRAYS


class Step(NamedTuple):
    """The arrays of one time step, each of shape `(batch, units)`.

    Until `c` and `h` are computed, they are those of the previous time step. A
    `SimpleRNN` has only `h`.
    """

    i: Any = None
    f: Any = None
    o: Any = None
    c_tilde: Any = None
    c: Any = None
    h: Any = None


class Call(NamedTuple):
    """A recurrent layer in a model, and the arguments that the model calls it with."""

    model: Any
    inputs: Any
    layer: Any
    sequences: np.ndarray
    h: np.ndarray
    c: np.ndarray
    mask: np.ndarray | None

    @property
    def shape(self):
        """The shape of the arrays of a trace: `(batch, time, units)`."""
        return *self.sequences.shape[:2], self.layer.cell.units


def find_call(model_or_layer, inputs, layer=None, simple_rnn=False):
    """Find the LSTM that `layer` selects, and capture its first call.

    Args:
        model_or_layer: See `trace_gates`.
        inputs: One batch: an array, a tensor or a nested list, or a list or dict of
            these.
        layer: See `trace_gates`; one LSTM, not a `Bidirectional` layer.
        simple_rnn: Boolean, whether `layer` may select a `SimpleRNN`.

    Returns:
        A `Call`.

    Raises:
        ValueError: If an argument is invalid, or if the layer is never called.
    """
    model = capture.load(model_or_layer)
    target = rnn = _find_simple_rnn(model, layer) if simple_rnn else None
    if rnn is None:
        target, rnn = _find_lstm(model, layer)
    capture.check_built(model, [rnn])
    time_major = getattr(model, "time_major", False)
    inputs, samples = check_inputs(inputs, time_major=time_major)
    arguments = next(capture.capture_calls(model, target, inputs, samples))[rnn]
    return Call(model, inputs, rnn, **({"c": None, "mask": None} | arguments))


def _find_lstm(model, layer):
    target, lstms = capture.find_lstms(model, layer)
    if len(lstms) > 1:
        names = " or ".join(repr(lstm.name) for lstm in lstms)
        raise ValueError(
            "`layer` must be one direction of the `Bidirectional` layer. Pass "
            f"{names}. Received: {target.name!r}"
        )
    (lstm,) = lstms
    is_scratch = isinstance(lstm.cell, ScratchLSTMCell)
    if is_scratch and type(lstm.cell).call is not ScratchLSTMCell.call:
        raise ValueError(
            "`layer` must have a cell that overrides `gates` only, so that its states "
            f"can be edited. Received: {lstm.name!r} with a "
            f"{type(lstm.cell).__name__!r}, which overrides `call`"
        )
    return target, lstm


def _find_simple_rnn(model, layer):
    layers = _keras.all_layers(model)
    found = [x for x in layers if isinstance(x, keras.layers.SimpleRNN)]
    if layer is not None:
        found = [x for x in found if x is layer or x.name == layer]
    elif capture.find_all(model):
        return None
    return found[0] if len(found) == 1 else None


def run(call, visit, inputs=None, new_sequences=None, record=False):
    """Run the model with a loop over time that calls `visit` for every array.

    The first call of the layer is changed. Variables keep their values.

    Args:
        call: A `Call`.
        visit: Function `(name, step, t)` that returns the new values of the array
            `name` of a `Step`. `t` is the time step, in the order of the inputs.
        inputs: Inputs of the model. Default: `None`, those of the call.
        new_sequences: Tensor that replaces the inputs of the layer. Default: `None`.
        record: Boolean, whether to return a `GateTrace`.

    Returns:
        `(outputs, trace)`: tensors, and a `GateTrace` or `None`.
    """
    steps, calls = {}, []

    def change(original, sequences, initial_state, mask=None, **options):
        if calls:
            return original(sequences, initial_state, mask, **options)
        calls.append(1)
        if new_sequences is not None:
            sequences = ops.cast(new_sequences, sequences.dtype)
        args = call.layer, sequences, initial_state, mask
        return _loop(*args, visit, steps, record)

    def keep(lstm, original, sequences, initial_state, mask=None, **_):
        return _loop(lstm, sequences, initial_state, mask, unchanged, {}, False)

    loops = {lstm: functools.partial(keep, lstm) for lstm in _others(call)}
    with capture.frozen(call.model), contextlib.ExitStack() as stack:
        for lstm, loop in {call.layer: change, **loops}.items():
            # On a GPU, `Bidirectional` runs cuDNN instead of its layers if they allow.
            scope = capture.replaced(lstm, "inner_loop", loop, use_cudnn=False)
            stack.enter_context(scope)
        outputs = call.model(call.inputs if inputs is None else inputs, training=False)
    return outputs, to_trace(call, steps) if record else None


def to_trace(call, steps):
    """Return a `GateTrace` of a dict of time step -> `Step`; `None` becomes NaN."""
    dtype = capture.result_dtype(call.layer)
    arrays = {}
    for name in ARRAYS:
        values = np.full(call.shape, np.nan, dtype)
        for t, step in steps.items():
            array = getattr(step, name)
            if array is not None:
                values[:, t] = ops.convert_to_numpy(array)
        if call.mask is not None:
            values[~call.mask] = np.nan
        arrays[name] = values
    return GateTrace(**arrays, mask=call.mask, layer=call.layer.name)


def _loop(layer, x, initial_state, mask, visit, steps, record):
    """Run what `keras.layers.RNN.inner_loop` does, as an eager loop."""
    mask = mask[0] if isinstance(mask, (list, tuple)) else mask
    mask = None if mask is None else ops.cast(mask, "bool")
    advance = _lstm(layer, x) if len(initial_state) == 2 else _simple_rnn(layer, x)
    states = "hc"[: len(initial_state)]
    step = Step(**dict(zip(states, initial_state, strict=True)))
    # Before the first unmasked time step, Keras's scan on JAX returns the state.
    is_scan = keras.backend.backend() == "jax" and not layer.unroll
    output = step.h if is_scan else ops.zeros_like(step.h)
    outputs, time = {}, x.shape[1]
    for t in reversed(range(time)) if layer.go_backwards else range(time):
        before, step = step, advance(visit, step, t)
        if record:
            steps[t] = step
        if mask is None:
            outputs[t] = step.h
            continue
        unmasked = mask[:, t, None]
        outputs[t] = output = ops.where(unmasked, step.h, output)
        if layer.zero_output_for_mask:
            outputs[t] = output * ops.cast(unmasked, output.dtype)
        # Masked time steps keep the states.
        for name in states:
            kept = ops.where(unmasked, getattr(step, name), getattr(before, name))
            step = step._replace(**{name: kept})
    sequence = ops.stack(list(outputs.values()), axis=1)
    return outputs[t], sequence, [getattr(step, name) for name in states]


def _lstm(layer, x):
    cell, gates = layer.cell, _gates(layer.cell, x)

    def advance(visit, step, t):
        step = step._replace(**dict(zip(ARRAYS, gates(step, t), strict=False)))
        for name in ARRAYS[: len(GATES)]:
            step = step._replace(**{name: visit(name, step, t)})
        step = step._replace(c=step.f * step.c + step.i * step.c_tilde)
        step = step._replace(c=visit("c", step, t))
        step = step._replace(h=step.o * cell.activation(step.c))
        return step._replace(h=visit("h", step, t))

    return advance


def _gates(cell, x):
    """Return a function `(step, t)` that computes the gates i, f, o and c_tilde."""
    if isinstance(cell, ScratchLSTMCell) and type(cell).gates is not (
        ScratchLSTMCell.gates
    ):
        x = ops.unstack(x, axis=1)
        return lambda step, t: cell.gates(x[t], step.h, step.c)
    weights = dict(named_weights(cell))

    def fused(prefix):
        parts = [weights[prefix + gate] for gate in GATES]
        return ops.cast(ops.concatenate(parts, axis=-1), cell.compute_dtype)

    z = ops.cast(x, cell.compute_dtype) @ fused("W_x")
    # Slices of one tensor would each have a gradient of its full size.
    z = ops.unstack(z + fused("b_") if cell.use_bias else z, axis=1)
    W_h, activations = fused("W_h"), (cell.recurrent_activation, cell.activation)
    compute = recurrence.compiled(_fused_gates)
    return lambda step, t: compute(z[t], step.h, W_h, activations)


def _fused_gates(z, h, W_h, activations):
    sigmoid, tanh = activations
    z_i, z_f, z_o, z_c = ops.split(z + h @ W_h, 4, axis=-1)
    return sigmoid(z_i), sigmoid(z_f), sigmoid(z_o), tanh(z_c)


def _simple_rnn(layer, x):
    x = ops.unstack(ops.cast(x, layer.cell.compute_dtype), axis=1)

    def advance(visit, step, t):
        step = step._replace(h=layer.cell(x[t], [step.h])[0])
        return step._replace(h=visit("h", step, t))

    return advance


def _others(call):
    """Return the other LSTMs of the model whose loop is slower than this one.

    On JAX, every eager call traces the loop of Keras again.
    """
    if keras.backend.backend() != "jax":
        return []
    layers = (keras.layers.LSTM, ScratchLSTM, keras.layers.RNN)
    cells = (keras.layers.LSTMCell, ScratchLSTMCell)
    return [
        lstm
        for target in capture.find_all(call.model)
        for lstm in capture.directions_of(target)
        if lstm is not call.layer and type(lstm) in layers and type(lstm.cell) in cells
    ]


def loss_function(loss, model, argument):
    """Return a function `(y_true, y_pred)` for a loss, or the model's compiled one."""
    if loss is not None:
        try:
            function = keras.losses.get(loss)
        except ValueError:
            rule = "the name of a Keras loss, or a function `(y_true, y_pred)`"
            raise _validation.invalid(argument, loss, rule) from None
        return lambda y_true, y_pred: ops.mean(function(y_true, y_pred))
    compiled = _keras.compiled_loss(model)
    if compiled is None:
        raise ValueError(
            f"`{argument}` must be given, since {model.name!r} is not compiled. "
            f"Received: {argument}=None"
        )
    return compiled


def unchanged(name, step, t):
    """The `visit` of `run` that changes nothing."""
    return getattr(step, name)
