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
from keras_scratch_lstm.tracing.capture import result_dtype
from keras_scratch_lstm.tracing.trace import ARRAYS

_CHUNK_SIZE = 2**20  # elements per array that are computed at a time: 4 MB
_LOCK = threading.RLock()


def run(layer, sequences, h, c, mask=None):
    """Run one LSTM on one batch, from the initial states `h` and `c`.

    All arguments but the layer are batch-major arrays. Returns a dict with the arrays
    of a `GateTrace`.
    """
    if layer.go_backwards:
        sequences = np.flip(sequences, 1)
        mask = None if mask is None else np.flip(mask, 1)
    # OpenVINO takes arrays only.
    weights = [ops.convert_to_numpy(value) for _, value in named_weights(layer.cell)]
    function = _compiled_function(layer)
    chunks, size = [], max(1, _CHUNK_SIZE // h.size)
    for start in range(0, sequences.shape[1], size):
        steps = slice(start, start + size)
        inputs = {"weights": weights, "sequences": sequences[:, steps], "h": h, "c": c}
        if mask is not None:
            inputs["mask"] = mask[:, steps]
        outputs = function.predict_on_batch(inputs)
        states = outputs.pop("states")
        if "c" not in outputs:
            outputs["c"] = _cell_states(c, **outputs, mask=inputs.get("mask"))
        chunks.append(outputs)
        h, c = states
    arrays = {
        name: np.concatenate([chunk.pop(name) for chunk in chunks], axis=1)
        for name in ARRAYS
    }
    if mask is not None:
        for values in arrays.values():
            values[~mask] = np.nan
        arrays["mask"] = mask
    if layer.go_backwards:
        arrays = {name: np.flip(values, 1) for name, values in arrays.items()}
    return arrays


def _cell_states(c, i, f, c_tilde, mask, **_):
    """Compute the cell state at every time step from the gates."""
    cell_states = np.empty_like(f)
    for t in range(f.shape[1]):
        c_next = f[:, t] * c + i[:, t] * c_tilde[:, t]
        c = c_next if mask is None else np.where(mask[:, t, None], c_next, c)
        cell_states[:, t] = c
    return cell_states


class _Function(keras.Model):
    """A function of nested tensors that Keras compiles by `predict_on_batch`.

    The weights are inputs, not variables: on JAX, a model's variables are not
    available to other threads while it predicts.
    """

    def __init__(self, function, dtype):
        super().__init__(name="function", dtype=dtype)
        self._function = function
        # On TensorFlow, XLA would compile the loop for every length.
        self.supports_jit = keras.backend.backend() != "tensorflow"
        self.built = True

    def call(self, inputs):
        return self._function(inputs)


_FUNCTIONS: Any = weakref.WeakKeyDictionary()  # of each layer


def _compiled_function(layer):
    with _LOCK:
        if layer not in _FUNCTIONS:
            _FUNCTIONS[layer] = _make_function(layer)
        return _FUNCTIONS[layer]


def _make_function(layer):
    cell = layer.cell
    if not isinstance(cell, ScratchLSTMCell):
        cell = _scratch_cell(cell)
    recompute = _must_recompute_gates(cell)
    compute = _from_hidden_states(cell) if recompute else _step_by_step(cell)
    dtype = result_dtype(layer)

    def function(inputs):
        # On OpenVINO, inputs have an unknown first dimension.
        weights = zip(cell.weights, inputs["weights"], strict=True)
        values = [(variable, ops.reshape(x, variable.shape)) for variable, x in weights]
        with keras.StatelessScope(values):
            outputs = compute(
                inputs["sequences"], inputs["h"], inputs["c"], inputs.get("mask")
            )
        return keras.tree.map_structure(lambda x: ops.cast(x, dtype), outputs)

    return _Function(function, dtype=cell.dtype_policy)


def _must_recompute_gates(cell):
    """Whether the implementation does not return the gates, but `h` gives them."""
    # In half precision, the rounding of c at each time step is not reproducible.
    is_reproducible = cell.compute_dtype in ("float32", "float64")
    hides_gates = "torch" in recurrence.implementations(use_cudnn=False)
    return cell.is_standard and is_reproducible and hides_gates


def _rnn_arguments(cell):
    arguments = {"return_sequences": True, "return_state": True, "name": "recurrence"}
    return {**arguments, "dtype": cell.dtype_policy}


def _from_hidden_states(cell):
    """Compute h by the layer itself, and all gates from h in one matmul."""
    # By default, cuDNN computes in TF32, which would not agree with the gates.
    rnn = ScratchLSTM(cell=cell, use_cudnn=False, **_rnn_arguments(cell))

    def compute(x, h_0, c_0, mask):
        h, *states = rnn(x, initial_state=[h_0, c_0], mask=mask)
        h_prev = _previous_hidden_states(h, h_0, mask)
        x, h_prev = (ops.reshape(v, (-1, v.shape[-1])) for v in (x, h_prev))
        gates = cell.gates(x, h_prev, None)  # these gates do not depend on c
        gates = [ops.reshape(values, ops.shape(h)) for values in gates]
        return {**Gates(*gates)._asdict(), "h": h, "states": states}

    return compute


def _previous_hidden_states(h, h_0, mask):
    h_0 = ops.expand_dims(h_0, 1)
    h_prev = ops.concatenate([h_0, h[:, :-1]], axis=1)
    if mask is None:
        return h_prev
    # Until the first unmasked time step, Keras outputs zeros and keeps the state.
    unmasked = ops.cast(mask, "int32")
    started = ops.cumsum(unmasked, axis=1) - unmasked > 0
    return ops.where(ops.expand_dims(started, -1), h_prev, h_0)


def _step_by_step(cell):
    """Compute all arrays in Keras's loop over time."""
    rnn = keras.layers.RNN(_TracingCell(cell), **_rnn_arguments(cell))

    def compute(x, h_0, c_0, mask):
        gates = [ops.zeros_like(h_0)] * len(Gates._fields)
        state = ops.concatenate([*gates, c_0, h_0], axis=-1)
        outputs, state = rnn(x, initial_state=[state], mask=mask)
        *_, c, h = ops.split(state, len(ARRAYS), axis=-1)
        arrays = ops.split(outputs, len(ARRAYS), axis=-1)
        return {**dict(zip(ARRAYS, arrays, strict=True)), "states": [h, c]}

    return compute


class _TracingCell(keras.layers.Layer):
    """A cell whose output is the concatenation of all arrays of a trace.

    So is its state: with a mask, Keras on JAX returns the first state as last output.
    """

    def __init__(self, cell):
        super().__init__(name="tracing_cell", dtype=cell.dtype_policy)
        self.cell = cell
        self.state_size = self.output_size = len(ARRAYS) * cell.units
        self.built = True

    def call(self, inputs, states):
        *_, c, h = ops.split(states[0], len(ARRAYS), axis=-1)
        i, f, o, c_tilde = self.cell.gates(inputs, h, c)
        if type(self.cell).call is ScratchLSTMCell.call:
            c = f * c + i * c_tilde  # without computing the gates twice
            h = o * self.cell.activation(c)
        else:
            _, (h, c) = self.cell(inputs, [h, c])
        outputs = ops.concatenate([i, f, o, c_tilde, c, h], axis=-1)
        return outputs, [outputs]


def _scratch_cell(cell):
    """Return a `ScratchLSTMCell` like a built-in cell, except for the weights."""
    scratch_cell = ScratchLSTMCell(
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
    scratch_cell.build((None, cell.kernel.shape[0]))
    return scratch_cell
