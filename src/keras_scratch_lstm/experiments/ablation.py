"""Silence each unit in turn, and measure how a loss changes."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation
from keras_scratch_lstm._types import Data, Layer, Model, Path, Selection
from keras_scratch_lstm.experiments.outputs import (
    concatenate,
    loss_function,
    to_targets,
)
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.call import map_with_masks, run
from keras_scratch_lstm.observing.inputs import read
from keras_scratch_lstm.observing.loop import ARRAYS, Map
from keras_scratch_lstm.tracing.trace import import_optional

if TYPE_CHECKING:
    import pandas

_GROUPS = 20  # of samples, whose losses give the standard error


@dataclass(frozen=True, eq=False)
class Ablation:
    """The results of `ablate_units`: a table with one row per layer, array and unit.

    Attributes:
        baseline: Float, the loss of the model without ablation.
        layer: Array of strings, the name of the layer of each row; a `Bidirectional`
            layer has two.
        array: Array of strings, the ablated gate or state of each row.
        unit: Array of integers, the ablated unit of each row.
        loss: Array of floats, the loss under each ablation.
        error: Array of floats, the standard error of each `change`: how far it may be
            off with other samples. It is the spread over 20 groups of consecutive
            samples, or over all samples if there are fewer; NaN for one sample.
    """

    baseline: float
    layer: np.ndarray
    array: np.ndarray
    unit: np.ndarray
    loss: np.ndarray
    error: np.ndarray

    @property
    def change(self) -> np.ndarray:
        """The loss of each row minus the baseline."""
        return self.loss - self.baseline

    def to_dataframe(self) -> "pandas.DataFrame":
        """Convert the table to a pandas `DataFrame`."""
        names = "layer", "array", "unit", "loss", "change", "error"
        pd = import_optional("pandas", "to_dataframe")
        return pd.DataFrame({name: getattr(self, name) for name in names})


def ablate_units(
    model: Model | Path,
    inputs: Data,
    targets: Data = None,
    *,
    loss: str | Callable[[Any, Any], Any] | None = None,
    layer: Layer | None = None,
    arrays: str | Iterable[str] = "h",
    units: Selection = None,
    method: Literal["zero", "mean"] = "zero",
    call_index: int = 0,
    batch_size: int = 1024,
    batches: int | None = None,
    verbose: int = 1,
) -> Ablation:
    """Silence each unit of an LSTM in turn, and measure how a loss changes.

    A unit is silenced at all time steps, so neither the LSTM nor later layers read
    it. The model runs as in `run_with_edits`. On Ctrl-C, the rows that are done are
    returned.

    Arguments that are not listed are those of `trace_gates`.

    Args:
        targets: The targets of the model. Default: `None`, those of the dataset.
        loss: A loss by name, a Keras loss or metric, or a function
            `(y_true, y_pred)`, of which the mean is taken, without masked time steps.
            Default: `None`, the compiled loss.
        layer: See `trace_gates`. Of a `Bidirectional` layer, the units of both
            directions are ablated.
        arrays: String or list of strings, the gates and states to ablate, each in
            turn. Default: `"h"`, the output of the unit.
        units: Integer, slice or list of integers, the units to ablate. Default:
            `None`, all.
        method: `"zero"`, or `"mean"`, which sets each unit to its mean over all
            samples and time steps. Default: `"zero"`.
        batch_size: Positive integer, the number of samples to run at a time: the
            inputs are repeated for several units. Models with a fixed batch size or
            a `time_major` layer run one unit at a time. Default: 1024.
        batches: Positive integer, how many batches of a dataset to use, or `None` for
            all. Default: `None`.
        verbose: 0 (silent), 1 (progress bar) or 2 (one line). Default: 1.

    Returns:
        An `Ablation`.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import ablate_units
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(1)]
    ... )
    >>> x, y = np.ones((2, 10, 8)), np.zeros((2, 1))
    >>> ablation = ablate_units(model, x, y, loss="mse", verbose=0)
    >>> ablation.change.shape
    (4,)

    References:

    - [Lakretz et al., 2019](https://aclanthology.org/N19-1002/)
    """
    names = [arrays] if isinstance(arrays, str) else arrays
    names = list(names) if isinstance(names, Iterable) else []
    if not names or not all(name in ARRAYS for name in names):
        raise _validation.invalid("arrays", arrays, f"among {str(ARRAYS)[1:-1]}")
    if method not in ("zero", "mean"):
        raise _validation.invalid("method", method, "'zero' or 'mean'")
    model, lstms = models.select(model, layer)
    units = _validation.select("units", units, lstms[0].cell.units)
    rows = [(lstm, name, int(u)) for lstm in lstms for name in names for u in units]
    loss = loss_function(loss, model)
    data = list(read(model, inputs, targets, batch_size=batch_size, batches=batches))
    targets = concatenate([to_targets(batch.targets) for batch in data])
    record = names if method == "mean" else ()
    found = [run(model, batch, lstms, None, record, call_index) for batch in data]
    samples = sum(batch.samples for batch in data)
    unchanged = [[outputs] for outputs, _ in found]
    ((baseline, *spread),) = _losses(loss, targets, unchanged, samples)
    values = _means([arrays for _, arrays in found], lstms, record)
    results: list[list[float]] = []
    progress = keras.utils.Progbar(len(rows), verbose=verbose, unit_name="unit")
    try:
        for several in _groups(rows, data, batch_size):
            maps = functools.partial(_maps, several, values)
            args = lstms, maps, len(several), call_index
            outputs = [_run(model, batch, *args) for batch in data]
            results += _losses(loss, targets, outputs, samples)
            results = results[: len(rows)]
            progress.update(len(results))
    except KeyboardInterrupt:
        pass
    rows = rows[: len(results)]
    return Ablation(
        baseline,
        layer=np.array([lstm.name for lstm, _, _ in rows]),
        array=np.array([name for _, name, _ in rows]),
        unit=np.array([unit for _, _, unit in rows], int),
        loss=np.array([result[0] for result in results]),
        error=_standard_errors([result[1:] for result in results], spread),
    )


def _groups(rows, data, batch_size):
    """Yield the rows in groups of one size, which need one compilation."""
    size = 1
    if not data[0].is_fixed:
        size = max(1, batch_size // max(batch.samples for batch in data))
    for start in range(0, len(rows), size):
        several = rows[start : start + size]
        yield several + several[-1:] * (min(size, len(rows)) - len(several))


def _run(model, batch, lstms, maps, times, call_index):
    """Run a batch that is repeated; return the outputs of each repetition."""
    if times > 1:
        inputs = keras.tree.map_structure(
            lambda x: ops.concatenate([ops.convert_to_tensor(x)] * times), batch.inputs
        )
        batch = batch._replace(inputs=inputs, samples=times * batch.samples)
    outputs, _ = run(model, batch, lstms, maps, (), call_index)

    def part(k, x):
        size = x.shape[0] // times
        return x[k * size : (k + 1) * size]

    return [map_with_masks(functools.partial(part, k), outputs) for k in range(times)]


def _losses(loss, targets, outputs, samples):
    """Return the loss of each repetition over all batches, and those of groups."""
    results, bounds = [], np.linspace(0, samples, min(samples, _GROUPS) + 1).astype(int)
    for parts in zip(*outputs, strict=True):
        together = concatenate(parts)
        values = [loss(targets, together)]
        flat = keras.tree.flatten([targets, together])
        # Of a `time_major` model, the first axis is not that of the samples.
        if all(tuple(x.shape)[:1] == (samples,) for x in flat):
            for start, stop in itertools.pairwise(bounds):
                take = functools.partial(_rows, start, stop)
                some = keras.tree.map_structure(take, targets)
                values.append(loss(some, map_with_masks(take, together)))
        results.append([float(ops.convert_to_numpy(value)) for value in values])
    return results


def _rows(start, stop, x):
    return x[start:stop]


def _standard_errors(losses, baseline):
    """Return those of the changes, from the losses of the same groups."""
    groups = len(baseline)
    if groups < 2:
        return np.full(len(losses), np.nan)
    changes = np.reshape(losses, (-1, groups)) - baseline
    return changes.std(axis=1, ddof=1) / groups**0.5


def _means(found, lstms, names):
    """Return the mean of each unit, 0 by default: `(layer, array)` -> array."""
    means = {lstm: collections.defaultdict(float) for lstm in lstms}
    for lstm in lstms:
        for name in names:
            values = [arrays[lstm][name] for arrays in found]
            values = [value.reshape(-1, value.shape[-1]) for value in values]
            means[lstm][name] = np.nanmean(np.concatenate(values), 0)
    return means


def _maps(rows, values, lstm, shapes, mask):
    """Return the maps of ablations, each for one part of the samples."""
    maps: dict[str, Map] = {}
    for k, (at, name, unit) in enumerate(rows):
        if at is not lstm:
            continue
        samples, _, units = shapes[name]
        if name not in maps:
            maps[name] = Map(np.ones((samples, units)), np.zeros((samples, units)))
        size = samples // len(rows)
        place = slice(k * size, (k + 1) * size), unit
        maps[name].a[place] = 0.0
        maps[name].b[place] = np.broadcast_to(values[lstm][name], units)[unit]
    return maps
