"""A recurrent layer's loop over time, in which every array is recorded or changed.

An experiment is an affine map `v -> a * v + b` of an array at every time step. A trace
is the experiment without maps, and the gradient by an array is that by its `b` at 0.
"""

import functools
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import recurrence
from keras_scratch_lstm.cell import Gates, ScratchLSTMCell
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.observing import standard
from keras_scratch_lstm.observing.replaced import replaced
from keras_scratch_lstm.per_gate import named_weights

GATES = Gates._fields
ARRAYS = (*GATES, "c", "h")
CHUNK_SIZE = 2**20  # elements per recorded array that are computed at a time: 4 MB


class Map(NamedTuple):
    """`v -> a * v + b`, exactly `b` where `a` is 0; with `a=None`, `v + b`.

    Both are of shape `(batch, time, units)`, or `(batch, units)` for all time steps.
    """

    a: Any
    b: Any

    def __call__(self, value):
        if self.a is None:
            return value + self.b
        return recurrence.where(self.a == 0, self.b, self.a * value + self.b)


def keep_masked(mask, new, old, where=recurrence.where):
    """Keep the old values at masked samples of a time step; of a list of arrays."""
    return [where(mask, *pair) for pair in zip(new, old, strict=True)]


class Loop:
    """What replaces the `inner_loop` of one layer; compiled once."""

    def __init__(self, layer):
        self.layer, self.cell = layer, layer.cell
        if type(layer.cell) is keras.layers.LSTMCell:
            self.cell = _scratch_cell(layer.cell)
        # A `SimpleRNN` has only h.
        self.arrays = ARRAYS if isinstance(self.cell, ScratchLSTMCell) else ("h",)
        self.unobserved = set()  # names of arrays that can be recorded only
        self._functions = {}  # compiled, of what they record and change

    def __call__(self, x, states, mask, maps, record):
        """Run the layer.

        Args:
            x: Tensor of shape `(batch, time, features)`.
            states: List of the initial `h` and `c`, or of `h` only.
            mask: Tensor of shape `(batch, time)`, or `None`.
            maps: Dict of array name, or `"x"` -> `Map`, or `None`.
            record: Sequence of array names.

        Returns:
            `(last, outputs, states, arrays)`. The first three are those of `RNN`;
            `arrays` is a dict of name -> NumPy array, in the order of the inputs,
            undefined at masked time steps.
        """
        dtype = self.cell.compute_dtype
        maps = keras.tree.map_structure(
            lambda v: None if v is None else ops.cast(v, dtype), dict(maps or {})
        )
        x = ops.cast(x, dtype)
        x = maps.pop("x")(x) if "x" in maps else x
        # Two arguments, since `tf.function` generalizes shapes and even ranks.
        always = {k: one for k, one in maps.items() if len(one.b.shape) == 2}
        moving = {k: one for k, one in maps.items() if k not in always}
        mask = None if mask is None else ops.cast(mask, "bool")[..., None]
        xs = {"x": x, "mask": mask}
        for name, (a, b) in moving.items():
            xs |= {f"a_{name}": a, f"b_{name}": b}
        xs = {name: self._to_loop(value) for name, value in xs.items()}
        states = [ops.cast(state, dtype) for state in states]
        carry = (self._first_output(states[0]), states)
        # Compiled once for each kind of experiment.
        kind = tuple(record), tuple(moving), tuple(always), mask is None
        if kind not in self._functions:
            function = functools.partial(self._run, *kind[:2])
            self._functions[kind] = recurrence.compiled(function)
        function = functools.partial(
            self._functions[kind], _weights_of(self.layer.cell)
        )
        outputs, carry, arrays = self._run_in_chunks(
            function, record, xs, carry, always
        )
        last = outputs[-1]
        if mask is not None and self.layer.zero_output_for_mask:
            last, outputs = self._zero_masked(last, outputs, xs["mask"])
        return last, ops.swapaxes(outputs, 0, 1), list(carry[1]), arrays

    def _run_in_chunks(self, function, record, xs, carry, always):
        """Run the compiled loop, with the recorded arrays in bounded memory."""
        time = size = xs["x"].shape[0]
        if record:
            size = max(1, CHUNK_SIZE // int(np.prod(carry[1][0].shape)))
        outputs, recorded = [], {name: [] for name in record}
        for start in range(0, time, size):
            stop = slice(start, start + size)
            chunk = xs
            if size < time:
                chunk = {k: None if v is None else v[stop] for k, v in xs.items()}
            carry, arrays = function(chunk, carry, always)
            outputs.append(arrays.pop("output"))
            for name, values in arrays.items():
                recorded[name].append(self._to_numpy(values))
        outputs = ops.concatenate(outputs) if len(outputs) > 1 else outputs[0]
        arrays = {
            name: parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
            for name, parts in recorded.items()
        }
        if self.layer.go_backwards:
            arrays = {name: np.flip(values, 1) for name, values in arrays.items()}
        return outputs, carry, arrays

    def _run(self, record, moving, weights, xs, carry, always):
        # On JAX, a model's variables are not available to other threads.
        with keras.StatelessScope(list(zip(self.cell.weights, weights, strict=True))):
            return self._scan(record, moving, xs, carry, always)

    def _scan(self, record, moving, xs, carry, always):
        output, (h, *_) = carry
        like = {"output": output} | dict.fromkeys(record, h)
        x, step, repeats_state = xs["x"], self._step, self._repeats_state
        if standard.applies(self.cell):
            unchanged = not moving and not always and xs["mask"] is None
            if unchanged and standard.is_exact(self.cell):
                states, arrays = standard.run_unchanged(self.cell, x, *carry[1], like)
                return (arrays["output"][-1], states), arrays
            x, step = standard.project(self.cell, x)

        def body(carry, now):
            (before, states), mask = carry, now["mask"]
            before = states[0] if repeats_state else before
            maps = {k: Map(now["a_" + k], now["b_" + k]) for k in moving} | always

            def observe(name, value):
                return maps[name](value) if name in maps else value

            output, new, arrays = step(now["x"], states, observe)
            if mask is not None:
                # Masked time steps keep the states, and repeat the output.
                output, *new = keep_masked(mask, [output, *new], [before, *states])
            return (output, new), {"output": output} | {k: arrays[k] for k in record}

        return recurrence.scan(body, carry, xs | {"x": x}, like)

    def _step(self, x, states, observe):
        """Run the cell; return its output, its states and a dict of its arrays."""
        if self.arrays == ("h",):
            output, _ = self.cell(x, states)
            h = observe("h", output)
            return h, [h], {"h": h}
        seen = {}

        def observe_once(_, name, value):
            if name not in seen:  # e.g. `c` of gates that need it, and again of `call`
                seen[name] = observe(name, value)
            return seen[name]

        with replaced(self.cell, "observe", observe_once):
            output, (h, c) = self.cell(x, states)
        new = {"h": h, "c": c}
        self.unobserved |= {k for k, v in new.items() if seen.get(k) is not v}
        if not all(name in seen for name in GATES):  # a `call` of its own
            self.unobserved |= set(GATES) - set(seen)
            gates = self.cell.gates(x, *states)
            seen = dict(zip(GATES, gates, strict=True)) | seen
        return output, [h, c], seen | new

    @property
    def _repeats_state(self):
        """Whether masked time steps output the state, as Keras's scan on JAX."""
        if keras.backend.backend() != "jax" or self.layer.unroll:
            return False
        returns_h = getattr(type(self.cell), "call", None) is ScratchLSTMCell.call
        return returns_h or not isinstance(self.layer, ScratchLSTM)

    def _first_output(self, h):
        size = self.layer.cell.output_size
        return ops.zeros((ops.shape(h)[0], size), dtype=h.dtype)

    def _zero_masked(self, last, outputs, mask):
        if not self.layer.unroll:
            outputs = ops.where(mask, outputs, 0)
            return outputs[-1], outputs
        if keras.backend.backend() == "jax":  # Keras ignores the option there
            return last, outputs
        # Keras zeroes unrolled outputs by the mask in the order of the inputs.
        return ops.where(mask[-1], last, 0), ops.where(self._flip(mask), outputs, 0)

    def _to_loop(self, value):
        """Return the time steps of the inputs first, in the order of the loop."""
        return None if value is None else self._flip(ops.swapaxes(value, 0, 1))

    def _to_numpy(self, values):
        """Return a recorded array batch-major, as float32 or float64."""
        is_float64 = self.cell.compute_dtype == "float64"
        values = ops.cast(values, "float64" if is_float64 else "float32")
        return np.swapaxes(ops.convert_to_numpy(values), 0, 1)

    def _flip(self, value):
        return ops.flip(value, 0) if self.layer.go_backwards else value


def _weights_of(cell):
    """The weights of a cell as tensors; those of a built-in cell by gate."""
    if type(cell) is keras.layers.LSTMCell:
        return [ops.convert_to_tensor(weight) for _, weight in named_weights(cell)]
    return [ops.convert_to_tensor(weight) for weight in cell.weights]


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
