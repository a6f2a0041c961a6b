"""Integrated gradients: attribute an output to the inputs of an LSTM."""

import warnings
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation, recurrence
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.call import run
from keras_scratch_lstm.observing.inputs import read
from keras_scratch_lstm.observing.loop import Map

_ROUNDING = 1e-5  # the error that float32 allows, per sum of the absolute scores


@dataclass(frozen=True, eq=False)
class Attribution:
    """The result of `integrated_gradients`.

    Attributes:
        scores: Array of shape `(batch, time, features)`.
        difference: Array of shape `(batch,)`, the output minus that of the baseline.
        error: Array of shape `(batch,)`, the absolute difference between the sum of
            the scores and `difference`.
        n_steps: Array of integers of shape `(batch,)`, the points of each path.
    """

    scores: np.ndarray
    difference: np.ndarray
    error: np.ndarray
    n_steps: np.ndarray


def integrated_gradients(
    model: Any,
    inputs: Any,
    *,
    target: int | tuple[int, ...],
    layer: Any = None,
    baseline: Any = 0.0,
    n_steps: int = 16,
    tolerance: float = 0.01,
    max_steps: int = 256,
    call_index: int = 0,
    batch_size: int = 256,
    batches: int | None = 1,
) -> Attribution:
    """Attribute an output to the inputs of an LSTM by integrated gradients.

    The scores of a sample add up to the difference between its output and the output
    for the baseline. Sum over the last axis for one score per time step.

    The model runs as in `run_with_edits`. Needs the TensorFlow, JAX or PyTorch
    backend.

    Arguments that are not listed are those of `trace_gates`.

    Args:
        target: Integer or tuple of integers, the index of the output to attribute, in
            the output of one sample: `k` for outputs of shape `(batch, classes)`,
            `(t, k)` for `(batch, time, classes)`.
        layer: See `trace_gates`. A `Bidirectional` layer has one input.
        baseline: Number, or array that broadcasts to the inputs of the LSTM, of shape
            `(batch, time, features)`. Default: 0.
        n_steps: Positive integer, the number of points of the path from the baseline
            to the inputs, by Gauss-Legendre quadrature. Default: 16.
        tolerance: Positive number, the error relative to the difference above which a
            sample is computed again with twice the points. Default: 0.01.
        max_steps: Positive integer, the most points. If the error of a sample is
            still larger then, there is a warning. Default: 256.
        batch_size: Positive integer, the number of samples to run at a time; each
            point of a path is one. Models with a fixed batch size or a `time_major`
            layer run one point at a time. Default: 256.

    Returns:
        An `Attribution`.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import integrated_gradients
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(3)]
    ... )
    >>> attribution = integrated_gradients(model, np.ones((1, 10, 8)), target=2)
    >>> attribution.scores.sum(axis=-1).shape
    (1, 10)

    References:

    - [Sundararajan, Taly and Yan, 2017](https://arxiv.org/abs/1703.01365)
    """
    n_steps = _validation.positive_integer("n_steps", n_steps)
    max_steps = _validation.positive_integer("max_steps", max_steps)
    tolerance = _validation.positive_number("tolerance", tolerance)
    model, lstms = models.select(model, layer)
    data = list(read(model, inputs, batch_size=batch_size, batches=batches))
    samples, start, parts = sum(batch.samples for batch in data), 0, []
    for batch in data:
        path = _Path(model, lstms, batch, target, call_index)
        path.start_from(baseline, start, samples)
        bounds = n_steps, max(n_steps, max_steps)
        parts.append(path.integrate(*bounds, tolerance, batch_size))
        start += batch.samples
    *fields, is_complete = (np.concatenate(one) for one in zip(*parts, strict=True))
    if not is_complete.all():
        warnings.warn(
            f"The scores of {np.count_nonzero(~is_complete)} of {samples} samples do "
            f"not add up to the difference of the outputs within tolerance={tolerance} "
            f"at max_steps={max_steps}; see `error`. Increase one of the two.",
            stacklevel=2,
        )
    return Attribution(*fields)


class _Path:
    """The straight path from the baseline to the inputs of the LSTM, of one batch."""

    def __init__(self, model, lstms, batch, target, call_index):
        # The padding of a fixed batch size stays, so that shapes do not change.
        self.batch = batch._replace(samples=batch.samples + batch.padding, padding=0)
        self.model, self.lstms, self.crop = model, lstms, batch.crop
        self.target, self.call_index = target, call_index
        self.samples = np.arange(self.batch.samples)
        outputs, found = run(model, self.batch, lstms, None, ("x",), call_index)
        x = found[lstms[0]]["x"]
        # A model that folds an axis into the batch has several rows per sample.
        self.x = x.reshape(len(self.samples), -1, *x.shape[1:])
        self.output = _pick(outputs, target)

    def start_from(self, baseline, start, samples):
        """Set the baseline, of which this batch takes the part from `start`."""
        rows, *shape = self.x.shape[1:]
        whole = samples * rows, *shape
        try:
            value = _validation.to_numpy(baseline)
            if value.dtype.kind not in "biuf":
                raise ValueError
            value = np.broadcast_to(value.astype(self.x.dtype), whole)
        except (TypeError, ValueError):
            rule = f"a number or an array that broadcasts to {whole}"
            raise _validation.invalid("baseline", baseline, rule) from None
        value = value.reshape(samples, rows, *shape)
        value = value[np.minimum(start + self.samples, samples - 1)]
        self.change = self.x - value
        output = self._outputs(self.samples, self._points(self.samples, 0.0))
        difference = ops.convert_to_numpy(self.output - output)
        self.difference = difference.astype("float64")

    def integrate(self, n_steps, max_steps, tolerance, batch_size):
        """Return the fields of an `Attribution`, and which samples are complete."""
        # All runs have the same size, and so need one compilation.
        size = min(batch_size, len(self.samples) * n_steps)
        scores, used = np.zeros(self.x.shape), np.zeros(len(self.samples), int)
        axes, samples = tuple(range(1, scores.ndim)), self.samples
        while samples.size and n_steps <= max_steps:
            mean = self._mean_gradient(samples, n_steps, size)
            scores[samples], used[samples] = self.change[samples] * mean, n_steps
            error = np.abs(scores.sum(axes) - self.difference)
            allowed = tolerance * np.abs(self.difference)
            allowed += _ROUNDING * np.abs(scores).sum(axes)
            samples, n_steps = np.flatnonzero(error > allowed), 2 * n_steps
        scores = scores.reshape(-1, *scores.shape[2:]).astype(self.x.dtype)
        fields = scores, self.difference, error, used, error <= allowed
        return [self.crop(field) for field in fields]

    def _mean_gradient(self, samples, n_steps, size):
        """Return the mean gradient over the path, for each of the samples."""
        # Nodes and weights on the interval from -1 to 1.
        nodes, weights = np.polynomial.legendre.leggauss(n_steps)
        alphas, weights = (1 + nodes) / 2, weights / 2
        if self.batch.is_fixed:
            gradients = [self._gradient(self.samples, alpha) for alpha in alphas]
            return np.tensordot(weights, gradients, 1)[samples]
        rows = np.arange(len(samples)).repeat(n_steps)
        steps = np.tile(np.arange(n_steps), len(samples))
        mean = np.zeros((len(samples), *self.x.shape[1:]))
        for start in range(0, len(rows), size):
            part = np.arange(start, start + size)
            weight = weights[steps[part % len(rows)]] * (part < len(rows))
            part %= len(rows)  # fills the last part
            gradient = self._gradient(samples[rows[part]], alphas[steps[part]])
            np.add.at(mean, rows[part], _column(weight, gradient) * gradient)
        return mean

    def _gradient(self, samples, alphas):
        """Return the gradient of the outputs at points of the paths of samples."""

        def output_of(tensors):
            return ops.sum(self._outputs(samples, tensors[0]))

        points = self._points(samples, alphas)
        (gradient,) = recurrence.gradient(output_of, [points])
        return ops.convert_to_numpy(gradient).reshape(-1, *self.x.shape[1:])

    def _points(self, samples, alphas):
        change = self.change[samples]
        points = self.x[samples] - _column(1 - np.asarray(alphas), change) * change
        return points.reshape(-1, *self.x.shape[2:]).astype(self.x.dtype)

    def _outputs(self, samples, points):
        """Return the target for other inputs of the LSTM."""
        batch = self.batch
        if samples is not self.samples:

            def take(x):
                return ops.take(ops.convert_to_tensor(x), samples, axis=0)

            inputs = keras.tree.map_structure(take, batch.inputs)
            batch = batch._replace(inputs=inputs, samples=len(samples))

        def maps(lstm, shapes, mask):
            return {"x": Map(0.0, points)}

        args = self.model, batch, self.lstms, maps, (), self.call_index
        return _pick(run(*args)[0], self.target)


def _column(values, like):
    """Return values per sample that broadcast along the other axes."""
    return np.reshape(values, (-1, *[1] * (like.ndim - 1)))


def _pick(outputs, target):
    """Return one output per sample."""
    index = target if isinstance(target, tuple) else (target,)
    shape = tuple(getattr(outputs, "shape", ()))[1:]
    is_valid = len(index) == len(shape) and all(
        isinstance(k, (int, np.integer))
        and not isinstance(k, bool)
        and -size <= k < size
        for k, size in zip(index, shape, strict=True)
    )
    if not is_valid:
        rule = f"an index of one sample's output, of shape {shape}"
        raise _validation.invalid("target", target, rule)
    return outputs[(slice(None), *index)]
