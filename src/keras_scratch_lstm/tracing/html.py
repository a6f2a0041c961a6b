"""Render the HTML report of a trace."""

import base64
import html
import json
import re
import zlib
from importlib import resources
from typing import NamedTuple

import numpy as np

from keras_scratch_lstm import _validation
from keras_scratch_lstm.tracing.tokens import are_characters, token_features

# Quantization levels; the report uses the most that fit into the size limit.
_LEVELS = 254, 191, 127, 95, 63, 47, 31, 15, 7
_MISSING = 255
# Base64 characters of the compressed values: 2,000 tokens of 256 units make 2.8 MB.
_SIZE_LIMIT = 2_800_000
_SIZE_LIMIT_PER_VALUE = _SIZE_LIMIT / (2000 * 256)
_LARGEST_SIZE_LIMIT = 64_000_000
_MAX_FEATURES = 24
_MAX_QUARTILE_STEPS = 20_000
_NOTEBOOK_LIMIT = 100_000  # values per array


class Series(NamedTuple):
    """What a report shows next to the trace; each is `None` if it is not given."""

    inputs: np.ndarray | None  # (batch, time, features), as the scores
    scores: np.ndarray | None
    names: list[str]
    times: list[list[str]] | None  # of all samples, or of each


def read_series(shape, inputs=None, feature_names=None, times=None, scores=None):
    """Check the arguments of `GateTrace.to_html`, for a trace of `(batch, time)`."""
    if inputs is not None:
        inputs = _read_numbers("inputs", inputs, shape)
    if scores is not None:
        scores = _read_numbers("scores", scores, shape)
        if inputs is None or scores.shape != inputs.shape:
            expected = None if inputs is None else inputs.shape
            rule = f"numbers of the shape of `inputs`, {expected}"
            raise _validation.invalid("scores", scores, rule)
    count = 0 if inputs is None else inputs.shape[2]
    names = [f"feature {k}" for k in range(count)]
    if feature_names is not None:
        is_list = isinstance(feature_names, (list, tuple, np.ndarray))
        names = list(map(_printable, feature_names)) if is_list else []
        if not is_list or len(set(names)) != count:
            rule = f"a list of {count} names, one for each feature of `inputs`"
            raise _validation.invalid("feature_names", feature_names, rule)
    if times is not None:
        times = _read_times(times, shape)
    return Series(inputs, scores, names, times)


def render(layer, arrays, sample=0, tokens=None, series=None, correlate=None):
    """Render the report that `GateTrace.to_html` writes.

    Args:
        layer: String, the name of the layer.
        arrays: Dict of array name -> array of shape `(batch, time, units)`, in the
            order of a `GateTrace`; NaN where masked.
        sample: Integer, the sequence that the report opens with.
        tokens: Lists of `time` strings, of all samples or of each, or `None`.
        series: `Series`, or `None`.
        correlate: `GateTrace.correlate`, or `None`.
    """
    batch, time, units = arrays["c"].shape
    inputs, scores, names, times = series or Series(None, None, [], None)
    features = _features((batch, time), tokens, inputs, names)
    correlations = {
        name: correlate(features, name) if correlate else {} for name in arrays
    }
    # A feature may be constant over the unmasked time steps.
    known = {
        feature
        for found in correlations.values()
        for feature, r in found.items()
        if np.isfinite(r).any()
    }
    shown = _shown_features(inputs, scores)
    data = {
        "sample": sample,
        "samples": batch,
        "time": time,
        "units": units,
        "tokens": tokens,
        "separate": tokens is None or not all(map(are_characters, tokens)),
        "times": times,
        "features": [names[k] for k in shown],
        "hidden": len(names) - len(shown),
        "inputs": _pack_series(inputs, shown),
        "scores": _pack_series(scores, shown),
        "variance": {
            name: _to_json(_finite(values).var(axis=(0, 1)).filled(0), 6)
            for name, values in arrays.items()
        },
        "correlations": {
            name: {key: _to_json(r, 4) for key, r in found.items() if key in known}
            for name, found in correlations.items()
        },
        "activity": _pack_activity(arrays["c"]),
        "sequences": _quantize_all(arrays),
    }
    values = {
        "layer": html.escape(_printable(layer)),
        # No `<` may end the script element.
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    template = resources.files(__package__).joinpath("report.html").read_text("utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], template)


def render_for_notebook(layer, arrays, mask, saturation):
    """Render the report in a frame, or a summary of a trace that is large."""
    batch, time, units = arrays["c"].shape
    if arrays["c"].size <= _NOTEBOOK_LIMIT:
        page = html.escape(render(layer, arrays))
        return (
            f'<iframe srcdoc="{page}" title="Gates" sandbox="allow-scripts"'
            ' style="width: 100%; height: 45rem; border: 0"></iframe>'
        )
    cells = [("array", "mean", "min", "max", "below 0.1", "above 0.9")]
    for name, values in arrays.items():
        finite = values[np.isfinite(values)]
        row = [finite.mean(), finite.min(), finite.max()] if finite.size else [np.nan]
        row += [np.nanmean(x) for x in saturation.get(name, ())] if finite.size else []
        cells.append((name, *(f"{x:.3f}" for x in row)))
    rows = ("".join(f"<td>{cell}</td>" for cell in row) for row in cells)
    name, masked = html.escape(_printable(layer)), "" if mask is None else ", masked"
    return (
        f"<p>Layer <code>{name}</code>: {batch} samples, {time} time steps, {units} "
        f"units{masked}. <code>trace.to_html(path)</code> writes the report.</p>"
        f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    )


def quantize(arrays, limit=_SIZE_LIMIT, choices=_LEVELS):
    """Quantize and compress a sequence's arrays for the script in the report.

    The error is at most half a quantization step, `(high - low) / levels / 2`. If `h`
    is `o * tanh(c)`, the script computes it from the quantized `o` and `c`.

    Args:
        arrays: Dict of array name -> array of shape `(time, units)`.
        limit: Number, the most characters of `values`, if any level keeps to it.
        choices: Tuple of integers, the numbers of levels to choose from.

    Returns:
        Dict of values for JSON: `levels`; `stored`, the names of the stored arrays;
        `low` and `high`, base64 of float32 of shape `(array, unit)`; `values`,
        base64 of zlib-compressed bytes of shape `(array, unit, time)`, 255 where a
        value is not finite.
    """
    stored = list(arrays)
    h = arrays["o"] * np.tanh(arrays["c"])
    if np.allclose(arrays["h"], h, atol=1e-5, equal_nan=True):
        stored.remove("h")
    values = _finite(np.stack([arrays[name].T for name in stored]))
    low, high = (
        x.filled(0).astype("float32") for x in (values.min(-1), values.max(-1))
    )
    span = np.where(high > low, high - low, 1)[..., None]
    share = ((values - low[..., None]) / span).clip(0, 1)
    for levels in choices:
        codes = np.rint(share * levels).filled(_MISSING).astype("uint8")
        packed = _base64(zlib.compress(codes.tobytes()))
        if len(packed) <= limit:
            break
    return {
        "levels": levels,
        "stored": stored,
        "low": _base64(low.tobytes()),
        "high": _base64(high.tobytes()),
        "values": packed,
    }


def _quantize_all(arrays):
    batch = len(arrays["c"])
    limit = min(_SIZE_LIMIT_PER_VALUE * arrays["c"].size, _LARGEST_SIZE_LIMIT)
    limit, choices, sequences = max(_SIZE_LIMIT, limit) / batch, _LEVELS, []
    for k in range(batch):
        one = {name: values[k] for name, values in arrays.items()}
        sequences.append(quantize(one, limit, choices))
        # More levels would hardly fit for the next sequence.
        choices = choices[choices.index(sequences[-1]["levels"]) :]
    return sequences


def _pack_activity(c):
    """Return where each unit's `c` is in its highest and in its lowest quarter.

    Two base64 strings of zlib-compressed bits, of shape `(unit, batch * time)`.
    """
    steps = c.reshape(-1, c.shape[2])
    finite = steps[np.isfinite(steps).all(axis=1)]
    finite = finite[:: 1 + len(finite) // _MAX_QUARTILE_STEPS]
    low, high = np.quantile(finite, (0.25, 0.75), axis=0) if len(finite) else (0, 0)
    return [
        _base64(zlib.compress(np.packbits(active.T).tobytes()))
        for active in (steps > high, steps < low)
    ]


def _features(shape, tokens, inputs, names):
    """Return the features to correlate the units with."""
    if tokens is None:
        return {name: inputs[..., k] for k, name in enumerate(names)}
    features = token_features([token for one in tokens for token in one])
    return {
        name: np.broadcast_to(values.reshape(-1, shape[1]), shape)
        for name, values in features.items()
    }


def _shown_features(inputs, scores):
    """Return the features of the largest scores, or else the first ones."""
    if inputs is None:
        return []
    order = np.arange(inputs.shape[2])
    if scores is not None:
        order = np.argsort(-_finite(np.abs(scores)).mean(axis=(0, 1)).filled(0))
    return sorted(order[:_MAX_FEATURES].tolist())


def _pack_series(values, shown):
    """Return base64 of float32 of shape `(batch, feature, time)`."""
    if values is None:
        return None
    return _base64(np.ascontiguousarray(values[..., shown].swapaxes(1, 2)).tobytes())


def _read_numbers(name, value, shape):
    try:
        array = _validation.to_numpy(value)
    except (TypeError, ValueError):  # rows of different lengths
        array = np.array(None)
    array = array[..., None] if array.ndim == 2 else array
    if not (
        array.dtype.kind in "biuf"
        and array.ndim == 3
        and array.shape[:2] == shape
        and array.shape[2]
    ):
        rule = f"numbers of shape {shape} or ({shape[0]}, {shape[1]}, features)"
        raise _validation.invalid(name, value, rule)
    return array.astype("<f4")


def _read_times(value, shape):
    try:
        array = _validation.to_numpy(value)
    except (TypeError, ValueError):
        array = np.array(None)
    if array.shape not in (shape, shape[1:]):
        rule = f"dates, numbers or strings of shape {shape[1:]} or {shape}"
        raise _validation.invalid("times", value, rule)
    if array.dtype.kind == "M":
        array = np.char.replace(np.datetime_as_string(array, unit="m"), "T", " ")
    return [list(map(_printable, one)) for one in array.reshape(-1, shape[1])]


def _printable(value):
    return "".join(c if c.isprintable() else "�" for c in str(value))


def _finite(values):
    return np.ma.masked_invalid(values.astype("float64"))


def _to_json(array, digits):
    return [None if np.isnan(x) else round(float(x), digits) for x in array]


def _base64(data):
    return base64.b64encode(data).decode("ascii")
