"""Run a model with the gates or states of an LSTM edited."""

import itertools
import math
import numbers
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation
from keras_scratch_lstm._types import Data, Layer, Model, Path, Selection
from keras_scratch_lstm._validation import select
from keras_scratch_lstm.experiments.outputs import concatenate
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.call import run
from keras_scratch_lstm.observing.inputs import read
from keras_scratch_lstm.observing.loop import ARRAYS, Map
from keras_scratch_lstm.tracing.trace import GateTrace, join

_NAMES = ("x", *ARRAYS)


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit of a gate or state, for `run_with_edits`.

    It assigns `array[samples, steps, units] = value`, or multiplies by `scale`.

    Args:
        array: String, one of `"i"`, `"f"`, `"o"`, `"c_tilde"`, `"c"` and `"h"`, or
            `"x"`, the inputs of the LSTM, of which `units` selects features.
        value: What replaces the values:

            - a number, or an array that broadcasts to the selected samples, time
              steps and units, in this order. Axes may be missing if the others fit
              in one way only;
            - a `GateTrace` of the same shape, whose values at the same place are
              taken (activation patching).
        scale: Number, the factor of the values, instead of `value`.
        units: Integer, slice or list of integers. Default: `None`, all.
        steps: Integer, slice or list of integers, in the order of the inputs.
            Default: `None`, all.
        samples: Integer, slice or list of integers. Default: `None`, all.

    Example:

    >>> from keras_scratch_lstm import Edit
    >>> silence = Edit("h", 0.0, units=[3])
    >>> freeze = [Edit("f", 1.0, steps=5), Edit("i", 0.0, steps=5)]
    """

    array: str
    value: float | np.ndarray | GateTrace | None = None
    _: KW_ONLY
    scale: float | None = None
    units: Selection = None
    steps: Selection = None
    samples: Selection = None

    def __post_init__(self) -> None:
        if self.array not in _NAMES:
            rule = f"one of {str(_NAMES)[1:-1]}"
            raise _validation.invalid("array", self.array, rule)
        if (self.value is None) == (self.scale is None):
            raise ValueError(
                "Exactly one of `value` and `scale` must be given. Received: "
                f"value={self.value!r}, scale={self.scale!r}"
            )
        is_number = isinstance(self.scale, numbers.Real) and math.isfinite(self.scale)
        if self.scale is not None and not is_number:
            raise _validation.invalid("scale", self.scale, "a finite number")


def run_with_edits(
    model: Model | Path,
    inputs: Data,
    *,
    edits: Edit | Iterable[Edit],
    layer: Layer | None = None,
    call_index: int = 0,
    batch_size: int = 32,
    batches: int | None = 1,
) -> tuple[Any, GateTrace]:
    """Run a model with gates or states of an LSTM edited.

    Everything that is computed from an edited array sees the edited values: in the
    same time step, in later ones, and in later layers. In the same time step, that is
    c, h, and in cells such as `PeepholeLSTMCell` also gates; see
    `ScratchLSTMCell.observe`.

    The model runs in inference mode and is not changed. Stateful layers start from
    their current states, which do not change. Masked time steps have no values to
    edit.

    Arguments that are not listed are those of `trace_gates`.

    Args:
        edits: `Edit`, or a list of these, applied in order. An empty list runs the
            model unedited.
        layer: Which LSTM to edit, as in `trace_gates`. For a `Bidirectional` layer,
            both of its layers are edited; of a `GateTrace`, the backward layer takes
            the values of `backward`.

    Returns:
        `(outputs, trace)`: the outputs of the model as NumPy arrays, and the
        `GateTrace` of the edited run.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import Edit, run_with_edits
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(2)]
    ... )
    >>> x = np.ones((1, 10, 8), "float32")
    >>> outputs, trace = run_with_edits(model, x, edits=Edit("h", 0.0, units=[3]))
    >>> trace.h[0, :, 3].any()
    np.False_
    """
    model, lstms = models.select(model, layer)
    edits = _check(edits)
    data = list(read(model, inputs, batch_size=batch_size, batches=batches))
    samples = sum(batch.samples for batch in data)
    outputs, arrays, start = [], [], 0
    for batch in data:
        maps = _Binding(edits, lstms, batch, start, samples)
        y, found = run(model, batch, lstms, maps, ARRAYS, call_index)
        outputs.append(y)
        arrays.append(found)
        start += batch.samples
    outputs = keras.tree.map_structure(ops.convert_to_numpy, concatenate(outputs))
    return outputs, join(arrays, lstms, GateTrace)


def _check(edits):
    received = edits
    edits = [edits] if isinstance(edits, Edit) else edits
    edits = list(edits) if isinstance(edits, Iterable) else [edits]
    if not all(isinstance(edit, Edit) for edit in edits):
        raise _validation.invalid("edits", received, "an `Edit` or a list of these")
    return edits


class _Binding:
    """The maps of edits for one batch, once the model has reached the layer."""

    def __init__(self, edits, lstms, batch, start, samples):
        self.edits, self.lstms, self.batch = edits, lstms, batch
        self.start, self.samples = start, samples  # of the batch, of all batches

    def __call__(self, lstm, shapes, mask):
        maps = {}
        for edit in self.edits:
            # Rows of a layer whose model folds an axis into the batch.
            rows, *shape = shapes[edit.array]
            size = rows // (self.batch.samples + self.batch.padding)
            if edit.array not in maps:
                zeros = np.zeros(shapes[edit.array])
                maps[edit.array] = Map(zeros + 1, zeros)
            a, b = maps[edit.array]
            place, scale, value = self._bind(edit, lstm, size, shape, mask)
            a[place], b[place] = scale * a[place], scale * b[place] + value
        return maps

    def _bind(self, edit, lstm, size, shape, mask):
        """Return the place of an edit in this batch, its scale and its value."""
        time, features = shape
        rows = select("samples", edit.samples, self.samples * size)
        steps = select("steps", edit.steps, time)
        place = rows, steps, select("units", edit.units, features)
        first = self.start * size
        here = (rows >= first) & (rows < first + self.batch.samples * size)
        inside = np.ix_(rows[here] - first, *place[1:])
        if edit.scale is not None:
            return inside, float(edit.scale), 0.0
        whole = (self.samples * size, time, features)
        read = np.ones((here.sum(), len(steps)), bool)
        if mask is not None:
            read = mask[inside[0][..., 0], inside[1][..., 0]]
        value = _value(edit, self._trace_of(edit, lstm), place, whole)[here]
        if not np.isfinite(value[read]).all():
            rule = "finite at all unmasked time steps that it edits"
            raise _validation.invalid("value", value, rule)
        return inside, 0.0, np.where(read[..., None], value, 0.0)

    def _trace_of(self, edit, lstm):
        """Return the trace to patch from, for this direction; else `None`."""
        if not isinstance(edit.value, GateTrace):
            return None
        trace = edit.value
        return trace.backward if lstm is not self.lstms[0] else trace


def _value(edit, trace, place, whole):
    """Return the values to assign, of the shape of the place."""
    value, shape = edit.value, tuple(map(len, place))
    if isinstance(value, GateTrace):
        if trace is None or edit.array == "x" or trace.i.shape != whole:
            received = "no `backward`" if trace is None else f"shape {trace.i.shape}"
            raise ValueError(
                f"`value` must be a `GateTrace` of shape {whole}, as the edited run. "
                f"Received: a `GateTrace` with {received}"
            )
        return getattr(trace, edit.array)[np.ix_(*place)]
    try:
        array = _validation.to_numpy(value)
        if array.dtype.kind not in "biuf":
            raise ValueError
        return np.broadcast_to(_with_all_axes(array.astype("float64"), shape), shape)
    except (TypeError, ValueError):
        rule = (
            "a number, a `GateTrace`, or an array that broadcasts in one way only to "
            f"the selected samples, steps and units, {shape}"
        )
        raise _validation.invalid("value", value, rule) from None


def _with_all_axes(array, shape):
    """Add the missing axes to an array if there is only one place for each."""
    found = set()
    for missing in itertools.combinations(range(3), 3 - array.ndim):
        full = np.expand_dims(array, missing).shape
        if all(n in (1, size) for n, size in zip(full, shape, strict=True)):
            found.add(full)
    if len(found) != 1:
        raise ValueError
    return array.reshape(found.pop())
