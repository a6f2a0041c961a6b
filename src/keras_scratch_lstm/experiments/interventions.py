"""Run a model with the gates or states of one LSTM edited."""

import functools
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation
from keras_scratch_lstm.experiments import loop
from keras_scratch_lstm.tracing import GateTrace
from keras_scratch_lstm.tracing.trace import ARRAYS, check_array

Selection = int | slice | Iterable[int] | None


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit of a gate or state, for `run_with_edits`.

    It assigns `array[samples, steps, units] = value`, or multiplies by `scale`.

    Args:
        array: String, one of `"i"`, `"f"`, `"o"`, `"c_tilde"`, `"c"` and `"h"`.
        value: What replaces the values:

            - a number, or an array that broadcasts to the selected samples, time
              steps and units, in this order;
            - a `GateTrace` of the same shape, whose values at the same place are
              taken (activation patching);
            - a function `(gates, t)`, called at each time step `t`, that returns a
              tensor that broadcasts to `(batch, units)`. `gates` has the attributes
              `i`, `f`, `o`, `c_tilde`, `c` and `h` with the tensors of the time
              step; `c` and `h` are the previous ones until they are computed.
        scale: Number, the factor of the values, instead of `value`.
        units: Integer, slice or list of integers. Default: `None`, all.
        steps: Integer, slice or list of integers, in the order of the inputs.
            Default: `None`, all.
        samples: Integer, slice or list of integers. Default: `None`, all.

    Example:

    >>> from keras_scratch_lstm import Edit
    >>> silence = Edit("h", 0.0, units=[3])
    >>> freeze = [Edit("f", 1.0, steps=5), Edit("i", 0.0, steps=5)]
    >>> coupled = Edit("f", lambda gates, t: 1 - gates.i)
    """

    array: str
    value: float | np.ndarray | GateTrace | Callable[[Any, int], Any] | None = None
    scale: float | None = None
    units: Selection = None
    steps: Selection = None
    samples: Selection = None

    def __post_init__(self) -> None:
        check_array(self.array)
        if (self.value is None) == (self.scale is None):
            raise ValueError(
                "Exactly one of `value` and `scale` must be given. Received: "
                f"value={self.value!r}, scale={self.scale!r}"
            )
        is_number = isinstance(self.scale, numbers.Real) and math.isfinite(self.scale)
        if self.scale is not None and not is_number:
            raise _validation.invalid("scale", self.scale, "a finite number")


def run_with_edits(
    model_or_layer: Any,
    inputs: Any,
    edits: Edit | Iterable[Edit],
    layer: Any = None,
) -> tuple[Any, GateTrace]:
    """Run a model with gates or states of one LSTM edited.

    At every time step, the edits of the gates come first, then those of the cell
    state, which is computed from the edited gates, then those of the hidden state.
    Later time steps and later layers see the edited values.

    The model runs in inference mode and is not changed. Stateful layers start from
    their current states, which do not change. If the model calls the layer several
    times, the first call is edited. Masked time steps have no values to edit.

    Args:
        model_or_layer: See `trace_gates`.
        inputs: One batch: an array, a tensor or a nested list, or a list or dict of
            these. It must have the batch size of the model if that is fixed.
        edits: `Edit`, or a list of these, applied in order. An empty list runs the
            model unedited.
        layer: Which LSTM to edit, as in `trace_gates`. For a `Bidirectional` layer,
            one of its two layers.

    Returns:
        `(outputs, trace)`: the outputs of the model as NumPy arrays, and the
        `GateTrace` of the edited run.

    Raises:
        ValueError: If an argument is invalid, or if the model does not call the layer.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import Edit, run_with_edits
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(2)]
    ... )
    >>> x = np.ones((1, 10, 8), "float32")
    >>> outputs, trace = run_with_edits(model, x, Edit("h", 0.0, units=[3]))
    >>> trace.h[0, :, 3].any()
    np.False_
    """
    call = loop.find_call(model_or_layer, inputs, layer)
    outputs, trace = loop.run(call, visitor(edits, call), record=True)
    return keras.tree.map_structure(ops.convert_to_numpy, outputs), trace


def visitor(edits, call):
    """Return the function for `loop.run` that applies the edits."""
    received = edits
    edits = [edits] if isinstance(edits, Edit) else edits
    edits = list(edits) if isinstance(edits, Iterable) else [edits]
    if not all(isinstance(edit, Edit) for edit in edits):
        raise _validation.invalid("edits", received, "an `Edit` or a list of these")
    bound = {name: [] for name in ARRAYS}
    for edit in edits:
        bound[edit.array].append(_bind(edit, call))

    def visit(name, step, t):
        for apply in bound[name]:
            step = step._replace(**{name: apply(getattr(step, name), step, t)})
        return getattr(step, name)

    return visit


def _bind(edit, call):
    """Check an edit, and return the function `(values, step, t)` that applies it."""
    batch, time, units = call.shape
    place = (
        select("samples", edit.samples, batch),
        select("steps", edit.steps, time),
        select("units", edit.units, units),
    )
    selected = np.zeros((batch, units), bool)
    selected[np.ix_(place[0], place[2])] = True
    selected, steps = ops.convert_to_tensor(selected), set(place[1].tolist())
    new_values = _new_values(edit, call, place)

    def apply(values, step, t):
        if t not in steps:
            return values
        return ops.where(selected, new_values(values, step, t), values)

    return apply


def _new_values(edit, call, place):
    """Return a function `(values, step, t)` for what the edit assigns."""
    if edit.scale is not None:
        return lambda values, step, t: values * float(edit.scale)
    if callable(edit.value):
        return functools.partial(_computed, edit.value)
    batch, _, units = call.shape
    samples, steps, selected_units = place
    full = np.zeros((len(steps), batch, units))
    value = _selected_values(edit, call, place).swapaxes(0, 1)
    full[:, samples[:, None], selected_units] = value
    full = ops.unstack(ops.cast(full, call.layer.cell.compute_dtype))
    at_step = dict(zip(steps.tolist(), full, strict=True))
    return lambda values, step, t: at_step[t]


def _selected_values(edit, call, place):
    """Check a number, an array or a `GateTrace`, and return its selected values."""
    value = edit.value
    if isinstance(value, GateTrace):
        value = getattr(value, edit.array)
        if value.shape != call.shape:
            rule = f"a `GateTrace` of shape {call.shape}, as the edited run"
            raise _validation.invalid("value", value, rule)
        value = value[np.ix_(*place)]
    shape = tuple(map(len, place))
    try:
        value = np.broadcast_to(_validation.to_numpy(value, "float64"), shape)
    except (TypeError, ValueError):
        rule = (
            "a number, a `GateTrace`, a function, or an array that broadcasts to the "
            f"selected samples, steps and units, {shape}"
        )
        raise _validation.invalid("value", edit.value, rule) from None
    read = np.ones(shape[:2], bool)
    if call.mask is not None:
        read = call.mask[np.ix_(*place[:2])]
    if not np.isfinite(value[read]).all():
        rule = "finite at all unmasked time steps that it edits"
        raise _validation.invalid("value", value, rule)
    return value


def _computed(function, values, step, t):
    new = function(step, t)
    try:
        return ops.broadcast_to(ops.cast(new, values.dtype), values.shape)
    except Exception:  # of any type, depending on the backend
        rule = "a function that returns what broadcasts to `(batch, units)`, "
        raise _validation.invalid(
            "value", new, f"{rule}{tuple(values.shape)}"
        ) from None


def select(argument, selection, size):
    """Return the indices that a selection has on an axis.

    Raises:
        ValueError: If it selects nothing, or an index that is out of range.
    """
    try:
        is_iterable = isinstance(selection, Iterable)
        key = list(selection) if is_iterable else selection
        indices = np.atleast_1d(np.arange(size)[slice(None) if key is None else key])
    except (IndexError, TypeError):
        indices = np.zeros(0)
    if indices.ndim != 1 or not indices.size:
        rule = f"an integer, a slice or a list of integers that selects some of {size}"
        raise _validation.invalid(argument, selection, rule)
    return indices
