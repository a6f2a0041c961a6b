"""Paths from baselines to the inputs of one batch, and what a model does along them."""

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation, recurrence
from keras_scratch_lstm.experiments.outputs import pick
from keras_scratch_lstm.observing.call import (
    evaluate,
    masked_inputs,
    run,
    values_of,
)

_ROUNDING = 1e-5  # the error that float32 allows, per sum of the absolute scores
_MAX_COMPILED = 8  # functions per model


def is_float(array):
    return _validation.dtype_of(array).startswith(("float", "bfloat"))


def quadrature(samples, baselines, n_steps, done):
    """Choose the points of integrated gradients by Gauss-Legendre quadrature.

    Returns:
        `(which, alphas, weights)`, each of shape `(points, samples)`: the index of a
        baseline, the position between it, 0, and the inputs, 1, and the weight.
    """
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)  # from -1 to 1
    nodes, weights = (1 + nodes) / 2, weights / 2 / baselines
    rows = np.arange(baselines).repeat(n_steps), *np.tile([nodes, weights], baselines)
    return [np.broadcast_to(row[:, None], (row.size, samples)) for row in rows]


def draw(seed, samples, baselines, n_steps, done):
    """Draw the points of expected gradients, after those that are done.

    All baselines are taken equally often. The positions are evenly spread over all of
    them, and over the visits of each, and start at random for each sample.
    """
    rng = np.random.default_rng(seed)
    order, start = rng.permutation(baselines), rng.random(samples)
    turn = rng.integers(baselines, size=samples) + done + np.arange(n_steps)[:, None]
    visit, place = np.divmod(turn, baselines)
    alphas = (start + place * 2**0.5 + visit * (5**0.5 - 1) / 2) % 1
    return order[place], alphas, np.full(alphas.shape, 1 / n_steps)


class Path:
    """The straight paths from baselines to the inputs, of one batch.

    Args:
        model: A built model or layer.
        batch: A `Batch`.
        lstms: The LSTMs whose inputs are attributed; if empty, those of the model.
        target: See `attribute`.
        call_index: See `trace_gates`.
        batch_size: Positive integer, how many points to run at a time.
    """

    def __init__(self, model, batch, lstms, target, call_index, batch_size):
        # The padding of a fixed batch size stays, so that shapes do not change.
        self.batch = batch._replace(samples=batch.samples + batch.padding, padding=0)
        self.crop, self.samples = batch.crop, np.arange(self.batch.samples)
        self.batch_size, self.size = batch_size, len(self.samples)
        self.values, self.is_folded = values_of(model), bool(lstms)
        self.inputs = keras.tree.map_structure(_validation.to_numpy, batch.inputs)
        places = ()
        if lstms:
            x = run(model, self.batch, lstms, None, ("x",), call_index)[1][lstms[0]]
            # A model that folds an axis into the batch has several rows per sample.
            shape = len(self.samples), -1, *x["x"].shape[1:]
            self.x = {lstms[0].name: x["x"].reshape(shape)}
        else:
            leaves = keras.tree.flatten(self.inputs)
            places = tuple(k for k, leaf in enumerate(leaves) if is_float(leaf))
            names = _names(model, self.inputs)
            dtype = "float64" if model.compute_dtype == "float64" else "float32"
            self.x = {names[k]: leaves[k].astype(dtype) for k in places}
        for name, x in self.x.items():
            if not np.isfinite(x).all():
                raise ValueError(
                    f"`inputs` must be finite. Received: NaN or infinite values in "
                    f"{name!r}. Fill missing values, or mask their time steps."
                )
        self.masks = {} if lstms else self._find_masks(model, batch.inputs)
        compiled = _compiled(model, places, lstms, target, call_index)
        self.forward, self.backward = compiled

    def start_from(self, baselines, kept, start):
        """Set the baselines, and compute the differences of the outputs.

        Args:
            baselines: Dict of input name -> array of shape `(n, samples, …)`.
            kept: Dict of input name -> indices of features that do not change.
            start: Integer, the first sample of this batch.
        """
        self.baselines, self.kept = baselines, kept
        self.n, total = next(iter(baselines.values())).shape[:2]
        self.columns = np.minimum(start + self.samples, total - 1)
        samples = self.samples
        self.output = self._outputs(samples, lambda part: self._points(part, 0, 1.0))
        which, rows = _product(np.arange(self.n), samples)
        at_baseline = self._outputs(
            rows, lambda part: self._points(rows[part], which[part], 0.0)
        )
        shape = self.n, *self.output.shape
        self.difference = self.output - at_baseline.reshape(shape).mean(axis=0)

    def integrate(self, n_steps, max_steps, tolerance, rule, adds):
        """Return scores, their number of points, and which samples are complete.

        Args:
            n_steps: Positive integer, the number of points to start with.
            max_steps: Positive integer, the most points.
            tolerance: Positive number, the error that is allowed.
            rule: Function `(baselines, n_steps, done)`; see `draw`.
            adds: Boolean, whether further points add to those before.
        """
        self._limit(self.n * n_steps)
        scores, used = self._zeros(), np.zeros(len(self.samples), int)
        samples, done = self.samples, 0
        while samples.size and n_steps <= max_steps:
            share = (n_steps - done) / n_steps if adds else 1.0
            new = self._integrate(samples, *rule(self.n, round(share * n_steps), done))
            for name, values in new.items():
                old = (1 - share) * scores[name][samples]
                scores[name][samples] = old + share * values[samples]
            used[samples] = done = n_steps
            allowed = tolerance * np.abs(self.difference)
            allowed += _ROUNDING * self._sum(scores, np.abs)
            is_complete = np.abs(self._sum(scores) - self.difference) <= allowed
            is_complete = is_complete.reshape(len(is_complete), -1).all(axis=1)
            samples, n_steps = np.flatnonzero(~is_complete), 2 * n_steps
        return scores, used, is_complete

    def occlude(self):
        """Return the changes of the output if one value at a time is replaced."""
        scores, samples = self._zeros(), self.samples
        self._limit(max(x[0].size for x in self.x.values()))
        for name, values in scores.items():
            for k in range(self.n):
                base = self._base(name, samples, k).reshape(len(samples), -1)
                differs = base != self.x[name].reshape(base.shape)
                cells, rows = _product(np.flatnonzero(differs.any(axis=0)), samples)

                def points(part, name=name, base=base, cells=cells, rows=rows):
                    rows, cells = rows[part], cells[part]
                    found = {key: x[rows] for key, x in self.x.items()}
                    flat = found[name].reshape(len(rows), -1)  # a view
                    flat[np.arange(len(rows)), cells] = base[rows, cells]
                    return list(found.values())

                change = self.output[rows] - self._outputs(rows, points)
                shape = base.shape + self.output.shape[1:]
                values.reshape(shape)[rows, cells] += change / self.n
        return scores, np.zeros(len(samples), int), np.ones(len(samples), bool)

    def finish(self, scores, used):
        """Return `(scores, inputs, arrays)`, the first two as dicts by input name."""
        error = np.abs(self._sum(scores) - self.difference)

        def crop(name, values):
            values = values.astype(self.x[name].dtype)
            if self.is_folded:
                values = values.reshape(-1, *values.shape[2:])
            return self.crop(values)

        dicts = [
            {name: crop(name, values) for name, values in one.items()}
            for one in (scores, self.x)
        ]
        arrays = self.difference, error, used, self.output
        return *dicts, [self.crop(array) for array in arrays]

    def _limit(self, points):
        """Choose the size of all runs, so that they need one compilation."""
        if not self.batch.is_fixed:
            self.size = min(self.batch_size, len(self.samples) * points)

    def _zeros(self):
        targets = self.output.shape[1:]
        return {name: np.zeros(x.shape + targets) for name, x in self.x.items()}

    def _sum(self, scores, function=np.asarray):
        """Return the sum of the scores of each sample, by target."""
        targets = self.output.ndim - 1
        return sum(
            function(x).sum(axis=tuple(range(1, x.ndim - targets)))
            for x in scores.values()
        )

    def _integrate(self, samples, which, alphas, weights):
        """Return the integrals for some samples; for the others, zeros."""
        # With a fixed batch size, each sample has its place in the batch.
        samples = self.samples if self.batch.is_fixed else samples
        steps, rows = _product(np.arange(len(which)), samples)
        columns = self.columns[rows]
        scores = self._zeros()
        for part, count in self._parts(len(rows)):
            at, row = (steps[part], columns[part]), rows[part]
            points = self._points(row, which[at], alphas[at])
            weight = weights[at] * (np.arange(len(part)) < count)
            change = [
                _column(weight, x) * (x[row] - self._base(name, row, which[at]))
                for name, x in self.x.items()
            ]
            for target in np.ndindex(self.output.shape[1:]):
                chosen = np.zeros((len(part), *self.output.shape[1:]))
                chosen[:, *target] = 1
                gradients = self._call(self.backward, row, points, chosen)
                for values, by, gradient in zip(
                    scores.values(), change, gradients, strict=True
                ):
                    gradient = ops.convert_to_numpy(gradient)
                    np.add.at(values, (row, ..., *target), by * gradient)
        return scores

    def _outputs(self, rows, points):
        """Return the target at points: a function of some indices of `rows`."""
        found = np.zeros((0,))
        for k, (part, count) in enumerate(self._parts(len(rows))):
            with recurrence.no_gradients():
                y = self._call(self.forward, rows[part], points(part))
            y = ops.convert_to_numpy(y)[:count].astype("float64")
            found = np.concatenate([found, y]) if k else y
        return found

    def _parts(self, count):
        """Yield indices of parts of the same size, and how many of them are new."""
        for start in range(0, count, self.size):
            part = np.arange(start, start + self.size)
            yield part % count, min(self.size, count - start)

    def _find_masks(self, model, inputs):
        """Return which time steps of the inputs are masked, and by which value."""
        found = {}
        for tensor, value in masked_inputs(model, inputs):
            for name, x in self.x.items():
                if np.array_equal(tensor, x):
                    found[name] = (x == value).all(axis=-1, keepdims=True), value
        return found

    def _base(self, name, rows, which):
        """Return the baseline of some rows, with the masks of the inputs."""
        x = self.x[name][rows]
        base = self.baselines[name][which, self.columns[rows]].astype(x.dtype)
        if name in self.masks:
            masked, value = self.masks[name]
            near = value + 1e-6 * abs(value) + 1e-7
            base = np.where(masked[rows], x, np.where(base == value, near, base))
            base = base.astype(x.dtype)
        base[..., self.kept[name]] = x[..., self.kept[name]]
        return base

    def _points(self, rows, which, alphas):
        found = []
        for name, x in self.x.items():
            alpha = _column(np.asarray(alphas, x.dtype), x)
            base = self._base(name, rows, which)
            found.append((1 - alpha) * base + alpha * x[rows])
        return found

    def _call(self, function, rows, points, *chosen):
        inputs = keras.tree.map_structure(
            lambda x: ops.convert_to_tensor(x[rows]), self.inputs
        )
        points = [ops.convert_to_tensor(point) for point in points]
        return function(self.values, inputs, points, *chosen)


def _compiled(model, places, lstms, target, call_index):
    """Return the target as a function of points, and its gradient; compiled once."""
    cache = vars(model).setdefault("_attributed", {})  # Keras tracks other attributes
    if len(cache) >= _MAX_COMPILED:
        cache.clear()
    key = places, tuple(map(id, lstms)), call_index
    key += (target if callable(target) else repr(target),)
    if key in cache:
        return cache[key]

    def forward(values, inputs, points):
        if lstms:
            (x,) = (ops.reshape(point, (-1, *point.shape[2:])) for point in points)
            arguments = inputs, lstms, x, call_index
        else:
            leaves = keras.tree.flatten(inputs)
            for place, point in zip(places, points, strict=True):
                leaves[place] = point
            arguments = (keras.tree.pack_sequence_as(inputs, leaves),)
        outputs = evaluate(model, values, *arguments)
        return pick(outputs, target, getattr(model, "output_names", ()))

    def backward(values, inputs, points, chosen):
        def output(points):
            y = forward(values, inputs, points)
            return ops.sum(y * ops.cast(chosen, y.dtype))

        return recurrence.gradient(output, points)

    cache[key] = tuple(map(recurrence.compiled, (forward, backward)))
    return cache[key]


def _names(model, inputs):
    """Return the names of the leaves of nested inputs."""
    paths = [path for path, _ in keras.tree.flatten_with_path(inputs)]
    symbolic = getattr(model, "inputs", None) or []
    if not any(isinstance(key, str) for path in paths for key in path):
        if len(symbolic) == len(paths):
            return [tensor.name for tensor in symbolic]
        paths = [("input", *path) for path in paths]
    return ["_".join(map(str, path)) for path in paths]


def _product(outer, inner):
    """Return both indices of all pairs, as two arrays."""
    return outer.repeat(len(inner)), np.tile(inner, len(outer))


def _column(values, like):
    """Return values per sample that broadcast along the other axes."""
    return np.reshape(values, (-1, *[1] * (like.ndim - 1)))
