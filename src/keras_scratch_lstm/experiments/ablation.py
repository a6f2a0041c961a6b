"""Silence each unit in turn, and measure how a loss or metric changes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm.experiments import loop
from keras_scratch_lstm.experiments.interventions import Selection, select
from keras_scratch_lstm.tracing.trace import ARRAYS, import_pandas

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Ablation:
    """The results of `ablate_units`: a table with one row per array and unit.

    Attributes:
        baseline: Float, the metric of the model without ablation.
        array: Array of strings, the ablated gate or state of each row.
        unit: Array of integers, the ablated unit of each row.
        metric: Array of floats, the metric under each ablation.
    """

    baseline: float
    array: np.ndarray
    unit: np.ndarray
    metric: np.ndarray

    @property
    def change(self) -> np.ndarray:
        """The metric of each row minus the baseline."""
        return self.metric - self.baseline

    def to_dataframe(self) -> "pandas.DataFrame":
        """Convert the table to a pandas `DataFrame`."""
        columns = {"array": self.array, "unit": self.unit, "metric": self.metric}
        return import_pandas().DataFrame({**columns, "change": self.change})


def ablate_units(
    model_or_layer: Any,
    inputs: Any,
    targets: Any,
    metric: str | Callable[[Any, Any], Any] | None = None,
    layer: Any = None,
    arrays: str | Iterable[str] = "h",
    units: Selection = None,
    method: Literal["zero", "mean"] = "zero",
    batch_size: int = 1024,
    verbose: int = 1,
) -> Ablation:
    """Silence each unit of an LSTM in turn, and measure how a metric changes.

    A unit is silenced at all time steps, so neither the LSTM nor later layers read
    it. The model runs as in `run_with_edits`. On Ctrl-C, the rows that are done are
    returned.

    Args:
        model_or_layer: See `trace_gates`.
        inputs: See `run_with_edits`.
        targets: The targets of the model.
        metric: A loss by name, or a function `(y_true, y_pred)` such as a Keras loss
            or metric. Its mean is taken. Default: `None`, the compiled loss.
        layer: See `run_with_edits`.
        arrays: String or list of strings, the gates and states to ablate, each in
            turn. Default: `"h"`, the output of the unit.
        units: Integer, slice or list of integers, the units to ablate. Default:
            `None`, all.
        method: `"zero"`, or `"mean"`, which sets each unit to its mean over all
            samples and time steps. Default: `"zero"`.
        batch_size: Positive integer, the number of samples to run at a time: the
            inputs are repeated for several units. Models with a fixed batch size or
            a `time_major` layer run one unit at a time. Default: 1024.
        verbose: 0 (silent), 1 (progress bar) or 2 (one line). Default: 1.

    Returns:
        An `Ablation`.

    Raises:
        ValueError: If an argument is invalid.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import ablate_units
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(1)]
    ... )
    >>> x, y = np.ones((2, 10, 8)), np.zeros((2, 1))
    >>> ablation = ablate_units(model, x, y, "mse", verbose=0)
    >>> ablation.change.shape
    (4,)

    References:

    - [Lakretz et al., 2019](https://aclanthology.org/N19-1002/)
    """
    batch_size = _validation.positive_integer("batch_size", batch_size)
    names = [arrays] if isinstance(arrays, str) else arrays
    names = list(names) if isinstance(names, Iterable) else []
    if not names or not all(name in ARRAYS for name in names):
        raise _validation.invalid("arrays", arrays, f"among {str(ARRAYS)[1:-1]}")
    if method not in ("zero", "mean"):
        raise _validation.invalid("method", method, "'zero' or 'mean'")
    call = loop.find_call(model_or_layer, inputs, layer)
    units = select("units", units, call.shape[2])
    measure = _measure(metric, call.model, targets)
    outputs, trace = loop.run(call, loop.unchanged, record=method == "mean")
    baseline = measure(outputs)
    rows = [(name, int(unit)) for name in names for unit in units]
    group = 1 if _is_fixed(call.model) else max(1, batch_size // call.shape[0])
    values = {name: np.zeros(call.shape[2]) for name in names}
    if method == "mean":
        values = {name: np.nanmean(getattr(trace, name), (0, 1)) for name in names}
    results: list[float] = []
    progress = keras.utils.Progbar(len(rows), verbose=verbose, unit_name="unit")
    try:
        for start in range(0, len(rows), group):
            several = rows[start : start + group]
            results += _ablate(call, several, values, measure)
            progress.update(len(results))
    except KeyboardInterrupt:
        pass
    array, unit = zip(*rows[: len(results)], strict=True) if results else ((), ())
    return Ablation(baseline, np.array(array), np.array(unit, int), np.array(results))


def _ablate(call, rows, values, measure):
    """Run the model once for several ablations; return the metric of each."""
    batch, _, units = call.shape
    masks, new = {}, {}
    for name in {name for name, _ in rows}:
        mask = np.zeros((len(rows), 1, units), bool)
        for k, (array, unit) in enumerate(rows):
            mask[k, :, unit] = array == name
        mask = np.broadcast_to(mask, (len(rows), batch, units))
        masks[name] = ops.convert_to_tensor(mask.reshape(-1, units))
        new[name] = ops.cast(values[name], call.layer.cell.compute_dtype)

    def visit(name, step, t):
        value = getattr(step, name)
        return ops.where(masks[name], new[name], value) if name in masks else value

    inputs = call.inputs
    if len(rows) > 1:
        inputs = keras.tree.map_structure(
            lambda x: ops.concatenate([ops.convert_to_tensor(x)] * len(rows)), inputs
        )
    outputs, _ = loop.run(call, visit, inputs)
    parts = [ops.split(y, len(rows)) for y in keras.tree.flatten(outputs)]
    return [
        measure(keras.tree.pack_sequence_as(outputs, part))
        for part in zip(*parts, strict=True)
    ]


def _measure(metric, model, targets):
    """Return a function of the model's outputs that computes the metric."""
    function = loop.loss_function(metric, model, "metric")
    targets = keras.tree.map_structure(ops.convert_to_tensor, targets)

    def measure(outputs):
        if isinstance(metric, keras.metrics.Metric):
            metric.reset_state()
        return float(ops.convert_to_numpy(function(targets, outputs)))

    return measure


def _is_fixed(model):
    """Whether the number of samples must be that of the inputs."""
    inputs = getattr(model, "inputs", None) or []
    return any(x.shape[0] is not None for x in inputs) or any(
        getattr(layer, "stateful", False) or getattr(layer, "time_major", False)
        for layer in _keras.all_layers(model)
    )
