"""Attribute an output of a model to its inputs, or to those of an LSTM."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import keras
import numpy as np

from keras_scratch_lstm import _validation
from keras_scratch_lstm.experiments.paths import Path, draw, is_float, quadrature
from keras_scratch_lstm.experiments.scores import Attribution
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.inputs import read

_METHODS = "integrated_gradients", "expected_gradients", "occlusion"


def attribute(
    model: Any,
    inputs: Any,
    *,
    target: int | slice | str | tuple[Any, ...] | Callable[[Any], Any],
    method: Literal[
        "integrated_gradients", "expected_gradients", "occlusion"
    ] = "integrated_gradients",
    baseline: Any = 0.0,
    keep: Any = None,
    wrt: Any = None,
    n_steps: int = 16,
    tolerance: float | None = None,
    max_steps: int = 1024,
    call_index: int = 0,
    batch_size: int = 256,
    batches: int | None = 1,
    feature_names: Any = None,
    seed: int | None = None,
) -> Attribution:
    """Attribute an output to the inputs of a model, or to those of one of its LSTMs.

    Each input value has a score: how much it moved the output from that of the
    baseline. The scores of integrated and expected gradients add up to this
    difference; those of occlusion are the changes when one value at a time is
    replaced by the baseline. Gradients need the TensorFlow, JAX or PyTorch backend.

    The model runs as in `run_with_edits`, and is compiled, so a second call with the
    same shapes takes less time. Masked time steps stay masked; their scores are 0.

    Arguments that are not listed are those of `trace_gates`.

    Args:
        target: The output to attribute:

            - an integer `k` for outputs of shape `(batch, classes)`, or a tuple
              `(t, k)` for `(batch, time, classes)`;
            - a slice, alone or in a tuple, for several at once;
            - the name of an output of a model with several, or `(name, index)`;
            - a function of the outputs that returns a tensor of shape `(batch,)`.
        method: `"integrated_gradients"`; `"expected_gradients"`, which draws pairs of
            a baseline and a point; or `"occlusion"`. Default:
            `"integrated_gradients"`.
        baseline: Number, or array of shape `(features,)`, `(time, features)` or
            `(batch, time, features)`. With another first axis, there are several
            baselines, over which the scores are averaged. For expected gradients,
            `(n, time, features)` is always a set of `n`. For several inputs, a number
            or a dict of input name -> baseline. Default: 0.
        keep: Index, name or list of these: features that have their own values in the
            baseline, such as the hour of the day. For several inputs, a dict.
            Default: `None`.
        wrt: `"inputs"`, all inputs of the model, or the name or index of an LSTM, or
            the layer itself, for the inputs of this layer. Default: `None`, the
            floating-point inputs of the model, or if all are integers, such as
            tokens, the inputs of its LSTM.
        n_steps: Positive integer, the number of points of a path from a baseline to
            the inputs, by Gauss-Legendre quadrature. For expected gradients, the
            number of draws. Default: 16.
        tolerance: Positive number, the error relative to the difference above which a
            sample is computed again with twice the points. Default: `None`, 0.01, or
            for expected gradients, whose draws are random, 0.1.
        max_steps: Positive integer, the most points. If the error of a sample is
            still larger then, there is a warning. Default: 1024.
        batch_size: Positive integer, the number of samples to run at a time; each
            point of a path is one. Default: 256.
        feature_names: List of strings, or a dict of these for several inputs.
        seed: Integer, for the draws of expected gradients. Default: `None`.

    Returns:
        An `Attribution`.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import attribute
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(3)]
    ... )
    >>> attribution = attribute(model, np.ones((1, 10, 8)), target=2, keep=[0, 1])
    >>> attribution.by_feature().shape
    (8,)

    References:

    - Integrated gradients:
      [Sundararajan, Taly and Yan, 2017](https://arxiv.org/abs/1703.01365)
    - Expected gradients: [Erion et al., 2021](https://arxiv.org/abs/1906.10670)
    """
    n_steps = _validation.positive_integer("n_steps", n_steps)
    max_steps = _validation.positive_integer("max_steps", max_steps)
    if method not in _METHODS:
        raise _validation.invalid("method", method, f"one of {str(_METHODS)[1:-1]}")
    is_random = method == "expected_gradients"
    if tolerance is None:
        tolerance = 0.1 if is_random else 0.01
    tolerance = _validation.positive_number("tolerance", tolerance)
    model = models.load(model)
    data = list(read(model, inputs, batch_size=batch_size, batches=batches))
    lstms = _lstms(model, wrt, data[0].inputs)
    samples, start, parts = sum(batch.samples for batch in data), 0, []
    if is_random and seed is None:
        seed = np.random.SeedSequence().entropy
    rule = functools.partial(draw, seed) if is_random else quadrature
    rule = functools.cache(functools.partial(rule, samples))
    for batch in data:
        path = Path(model, batch, lstms, target, call_index, batch_size)
        options = _Options(path.x, bool(lstms), feature_names, keep)
        starts = options.baselines(baseline, samples, is_random)
        path.start_from(starts, options.kept, start)
        if method == "occlusion":
            *found, is_complete = path.occlude()
        else:
            limits = n_steps, max(n_steps, max_steps), tolerance
            *found, is_complete = path.integrate(*limits, rule, is_random)
        parts.append((*path.finish(*found), path.crop(is_complete)))
        start += batch.samples
    scores, inputs, arrays, complete = zip(*parts, strict=True)
    _warn(np.concatenate(complete), tolerance, max_steps)
    difference, error, used, output = map(np.concatenate, zip(*arrays, strict=True))
    return Attribution(
        _join(scores), difference, error, used, output, _join(inputs), feature_names
    )


def _warn(is_complete, tolerance, max_steps):
    count = np.count_nonzero(~is_complete)
    if count:
        warnings.warn(
            f"The scores of {count} of {len(is_complete)} samples do not add up to the "
            f"difference of the outputs within tolerance={tolerance} at "
            f"max_steps={max_steps}; see `error`. Increase one of the two.",
            stacklevel=3,
        )


def _lstms(model, wrt, inputs):
    """Return the LSTMs whose inputs are attributed, or `[]` for those of the model."""
    leaves = keras.tree.flatten(inputs)
    has_floats = any(map(is_float, leaves)) and not getattr(model, "time_major", False)
    if wrt is None:
        wrt = "inputs" if has_floats else None
    elif isinstance(wrt, str) and wrt == "inputs":
        dtypes = [_validation.dtype_of(x) for x in leaves if not is_float(x)]
        if not has_floats or set(dtypes) - {"bool"}:
            layers = [repr(lstm.name) for lstm in models.find_all(model)]
            raise ValueError(
                "`wrt` must be an LSTM if the inputs are not all batch-major, floating-"
                f"point numbers. Pass `wrt=` one of: {', '.join(layers)}. Received: "
                f"wrt='inputs' with inputs of dtype {', '.join(dtypes) or 'float'}"
            )
    if isinstance(wrt, str) and wrt == "inputs":
        models.check_built(model)
        return []
    return models.select(model, wrt, argument="wrt")[1]


class _Options:
    """The arguments that each input has of its own.

    Args:
        x: Dict of input name -> array of shape `(batch, …, features)`.
        is_folded: Boolean, whether the second axis is part of the batch.
    """

    def __init__(self, x, is_folded, feature_names, keep):
        self.x, self.is_folded, self.kept = x, is_folded, {}
        names = self._by_input("feature_names", feature_names)
        for name, kept in self._by_input("keep", keep).items():
            size, known = (
                x[name].shape[-1],
                list(names[name] or range(x[name].shape[-1])),
            )
            if len(known) != size:
                rule = f"a list of {size} names"
                raise _validation.invalid("feature_names", feature_names, rule)
            if isinstance(kept, str):
                kept = [kept]
            if isinstance(kept, Iterable):
                kept = [known.index(k) if k in known else k for k in kept]
            is_none = kept is None or kept == []
            kept = [] if is_none else _validation.select("keep", kept, size)
            self.kept[name] = np.array(kept, int)

    def baselines(self, value, samples, is_set):
        """Return a dict of arrays of shape `(n, samples, …)`."""
        found = {}
        for name, one in self._by_input("baseline", value, 0.0).items():
            fold, *shape = self.x[name].shape[self.is_folded :]
            whole = samples * (fold if self.is_folded else 1), *shape
            try:
                found[name] = self._spread(_validation.to_numpy(one), whole, is_set)
            except (TypeError, ValueError):
                rule = (
                    f"a finite number, an array that broadcasts to {whole}, or several"
                )
                raise _validation.invalid("baseline", one, rule) from None
            if self.is_folded:
                n = len(found[name])
                found[name] = found[name].reshape(n, samples, fold, *shape)
        n = max(map(len, found.values()))
        if {len(one) for one in found.values()} - {1, n}:
            raise _validation.invalid("baseline", value, "as many for each input")
        return {k: np.broadcast_to(v, (n, *v.shape[1:])) for k, v in found.items()}

    def _spread(self, array, whole, is_set):
        """Return one or more baselines, broadcast to `(n, *whole)`."""
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise ValueError
        if array.ndim < len(whole) or not is_set:
            with contextlib.suppress(ValueError):
                return np.broadcast_to(array, whole)[None]
        if array.ndim < 2:
            raise ValueError
        n, *shape = array.shape
        shape = [1] * (len(whole) - len(shape)) + shape
        return np.broadcast_to(array.reshape(n, *shape), (n, *whole))

    def _by_input(self, argument, value, default=None):
        """Return a dict of input name -> value."""
        if isinstance(value, Mapping):
            if set(value) <= set(self.x):
                return {name: value.get(name, default) for name in self.x}
        elif len(self.x) == 1 or value is None or np.ndim(value) == 0:
            return dict.fromkeys(self.x, value)
        rule = f"a dict of input name -> value, for {str(list(self.x))[1:-1]}"
        raise _validation.invalid(argument, value, rule)


def _join(parts):
    """Concatenate dicts of arrays, padded to the same time; of one, the array."""
    found = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        time = max(x.shape[1] for x in arrays)
        for k, x in enumerate(arrays):
            width = [(0, 0), (0, time - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
            arrays[k] = np.pad(x, width)
        found[name] = np.concatenate(arrays)
    return found if len(found) > 1 else found[name]
