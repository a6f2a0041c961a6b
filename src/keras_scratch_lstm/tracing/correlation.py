"""Correlations of features with units."""

from collections.abc import Mapping

import numpy as np

from keras_scratch_lstm import _validation


def correlations(values, unmasked, features):
    """Return the correlations of `GateTrace.correlate`.

    Args:
        values: Array of shape `(batch, time, units)`.
        unmasked: Boolean array of shape `(batch, time)`.
        features: See `GateTrace.correlate`.
    """
    if not isinstance(features, Mapping):
        rule = "a dict of feature name -> array"
        raise _validation.invalid("features", features, rule)
    found, shape = {}, unmasked.shape
    with np.errstate(invalid="ignore"):  # infinite values
        centered = _center(values[unmasked])
    for name, feature in features.items():
        feature = _validation.to_numpy(feature)
        has_shape = feature.shape in (shape, shape[1:])
        if feature.dtype.kind not in "biuf" or not has_shape:
            rule = f"booleans or numbers of shape {shape[1:]} or {shape}"
            raise _validation.invalid(f"features[{name!r}]", feature, rule)
        feature = np.broadcast_to(feature, shape).astype("float64")
        known = unmasked & ~np.isnan(feature)
        with np.errstate(invalid="ignore"):
            x = centered if (known == unmasked).all() else _center(values[known])
            y = _center(feature[known])
            norms = np.sqrt((x**2).sum(axis=0) * (y**2).sum())
            found[name] = y @ x / np.where(norms > 0, norms, np.nan)
    return found


def _center(x):
    x = x.astype("float64")
    x = x - x[:1]  # of a constant, exactly zero
    return x - x.sum(axis=0) / max(len(x), 1)
