"""Recompute the gates of an LSTM from its inputs, initial states and weights."""

import threading
import weakref
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import recurrence
from keras_scratch_lstm.cell import Gates, ScratchLSTMCell
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.per_gate import named_weights
from keras_scratch_lstm.tracing.trace import ARRAYS

# Numbers an array may have for the steps that are computed at once: 4 MB.
_NUMBERS_AT_ONCE = 2**20
_LOCK = threading.RLock()


def run(layer, sequences, h, c, mask=None):
    """Runs one LSTM over a batch; its arrays by name."""
    if layer.go_backwards:
        sequences = np.flip(sequences, 1)
        mask = None if mask is None else np.flip(mask, 1)
    weights = [value for _, value in named_weights(layer.cell)]
    run = _recurrence(layer).predict_on_batch
    time, arrays = sequences.shape[1], {}
    steps = max(1, _NUMBERS_AT_ONCE // h.size)
    for start in range(0, time, steps):
        now = slice(start, start + steps)
        inputs = {"weights": weights, "sequences": sequences[:, now], "h": h, "c": c}
        if mask is not None:
            inputs["mask"] = mask[:, now]
        outputs = run(inputs)
        states = outputs.pop("states")
        if "all_six" in outputs:
            six = np.split(outputs["all_six"], len(ARRAYS), axis=-1)
            outputs = dict(zip(ARRAYS, six, strict=True))
        else:
            outputs["c"] = _memory(c, **outputs, mask=inputs.get("mask"))
        put(arrays, outputs, 1, start, time)
        h, c = states
    if mask is not None:
        for values in arrays.values():
            values[~mask] = np.nan
        arrays["mask"] = mask
    if layer.go_backwards:
        arrays = {name: np.flip(values, 1) for name, values in arrays.items()}
    return arrays


def put(whole, part, axis, start, size):
    """Puts a part's arrays into the whole ones, which the first part makes."""
    for name, values in part.items():
        if values.shape[axis] == size:
            whole[name] = values
            continue
        if name not in whole:
            shape = (*values.shape[:axis], size, *values.shape[axis + 1 :])
            whole[name] = np.empty(shape, values.dtype)
        stop = start + values.shape[axis]
        whole[name][(slice(None),) * axis + (slice(start, stop),)] = values


def _memory(c, i, f, c_tilde, mask, **_):
    """c of all steps, from the gates."""
    memory = np.empty_like(f)
    for t in range(f.shape[1]):
        new = f[:, t] * c + i[:, t] * c_tilde[:, t]
        c = new if mask is None else np.where(mask[:, t, None], new, c)
        memory[:, t] = c
    return memory


class _Function(keras.Model):
    """A function of nested tensors, to be run by `predict_on_batch`.

    So Keras compiles it where the backend compiles, and records no gradients.
    It has a model's form, since Keras does this for models alone. But it has no
    weights; they are among the inputs, so that it can run in several threads:
    on JAX, variables of a model are out of use while it predicts.
    """

    def __init__(self, function, dtype):
        super().__init__(name="function", dtype=dtype)
        self._function = function
        self.built = True

    def call(self, inputs):
        return self._function(inputs)


_RECURRENCES: Any = weakref.WeakKeyDictionary()


def _recurrence(layer):
    """The compiled recurrence of a layer, the same one at each call."""
    with _LOCK:
        if layer not in _RECURRENCES:
            _RECURRENCES[layer] = _make_recurrence(layer)
        return _RECURRENCES[layer]


def _make_recurrence(layer):
    cell = layer.cell
    if not isinstance(cell, ScratchLSTMCell):
        cell = _same_cell(cell)
    make = _fused if _has_kernel(cell) else _step_by_step
    rnn, run = make(cell)
    dtype = _dtype_of_results(layer)

    def with_weights(inputs):
        values = zip(cell.weights, inputs["weights"], strict=True)
        with keras.StatelessScope(values):
            results = run(*(inputs.get(key) for key in ("sequences", "h", "c", "mask")))
        return keras.tree.map_structure(lambda x: ops.cast(x, dtype), results)

    function = _Function(with_weights, dtype=cell.dtype_policy)
    function.supports_jit = rnn.supports_jit
    return function


def _has_kernel(cell):
    """Whether the layer may run in a kernel that keeps the gates to itself."""
    plain = (
        type(cell).gates is ScratchLSTMCell.gates
        and type(cell).call is ScratchLSTMCell.call
        # Elsewhere, c is rounded at each step, which cannot be told from outside.
        and cell.compute_dtype in ("float32", "float64")
    )
    return plain and not {"torch", "cudnn"}.isdisjoint(recurrence.implementations())


def _fused(cell):
    """h from the layer itself; the gates from h, all steps in one product.

    c is left to `_memory`: here no gate looks at it.
    """
    rnn = ScratchLSTM(
        cell=cell,
        return_sequences=True,
        return_state=True,
        name="recurrence",
        dtype=cell.dtype_policy,
    )

    def run(x, h_0, c_0, mask):
        h, *states = rnn(x, initial_state=[h_0, c_0], mask=mask)
        before = _one_step_before(h, h_0, mask)
        x, before = (ops.reshape(v, (-1, v.shape[-1])) for v in (x, before))
        gates = cell.gates(x, before, None)
        gates = [ops.reshape(values, ops.shape(h)) for values in gates]
        return {**Gates(*gates)._asdict(), "h": h, "states": states}

    return rnn, run


def _one_step_before(h, h_0, mask):
    """The h that each step starts from."""
    h_0 = ops.expand_dims(h_0, 1)
    before = ops.concatenate([h_0, h[:, :-1]], axis=1)
    if mask is None:
        return before
    # Until the first step that counts, Keras puts out zeros and keeps the state.
    counts = ops.cast(mask, "int32")
    seen = ops.cumsum(counts, axis=1) - counts > 0
    return ops.where(ops.expand_dims(seen, -1), before, h_0)


def _step_by_step(cell):
    """All six from Keras's own loop."""
    rnn = keras.layers.RNN(
        _AllSix(cell),
        return_sequences=True,
        return_state=True,
        name="recurrence",
        dtype=cell.dtype_policy,
    )

    def run(x, h_0, c_0, mask):
        gates = [ops.zeros_like(h_0)] * len(Gates._fields)
        before = ops.concatenate([*gates, c_0, h_0], axis=-1)
        all_six, state = rnn(x, initial_state=[before], mask=mask)
        *_, c, h = ops.split(state, len(ARRAYS), axis=-1)
        return {"all_six": all_six, "states": [h, c]}

    return rnn, run


class _AllSix(keras.layers.Layer):
    """A cell whose output is all six arrays side by side.

    They are its state as well, though it needs no more than h and c: where there
    is a mask, Keras on JAX takes the first state for the last output.
    """

    def __init__(self, cell):
        super().__init__(name="all_six", dtype=cell.dtype_policy)
        self.cell = cell
        self.state_size = [len(ARRAYS) * cell.units]
        self.output_size = len(ARRAYS) * cell.units
        self.built = True

    def call(self, inputs, states):
        *_, c, h = ops.split(states[0], len(ARRAYS), axis=-1)
        i, f, o, c_tilde = self.cell.gates(inputs, h, c)
        if type(self.cell).call is ScratchLSTMCell.call:
            # What the cell does; to ask it would be to compute the gates twice.
            c = f * c + i * c_tilde
            h = o * self.cell.activation(c)
        else:
            _, (h, c) = self.cell(inputs, [h, c])
        all_six = ops.concatenate([i, f, o, c_tilde, c, h], axis=-1)
        return all_six, [all_six]


def _same_cell(cell):
    """A `ScratchLSTMCell` for a built-in cell; its weights are yet to be given."""
    same = ScratchLSTMCell(
        cell.units,
        activation=cell.activation,
        recurrent_activation=cell.recurrent_activation,
        use_bias=cell.use_bias,
        kernel_initializer="zeros",
        recurrent_initializer="zeros",
        seed=0,
        dtype=cell.dtype_policy,
        name="cell",
    )
    same.build((None, cell.kernel.shape[0]))
    return same


def _dtype_of_results(layer):
    return "float64" if layer.cell.compute_dtype == "float64" else "float32"
