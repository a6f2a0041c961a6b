"""Render the HTML report of one sample."""

import base64
import html
import json
import re
import zlib
from importlib import resources

import numpy as np

from keras_scratch_lstm.tracing.tokens import are_characters

# Quantization levels; the report uses the most that fit into the size limit.
_LEVELS = 254, 191, 127, 95, 63, 47, 31
_MISSING = 255
# Base64 characters of the compressed values: 2,000 tokens of 256 units make 2.8 MB.
_SIZE_LIMIT = 2_800_000
_SIZE_LIMIT_PER_VALUE = _SIZE_LIMIT / (2000 * 256)


def render(layer, arrays, tokens=None, correlations=None):
    """Render the report that `GateTrace.to_html` writes.

    Args:
        layer: String, the name of the layer.
        arrays: Dict of array name -> array of shape `(time, units)`, in the order of
            a `GateTrace`; NaN where masked.
        tokens: List of `time` strings, or `None`.
        correlations: Dict of array name -> result of `GateTrace.correlate`, or `None`.
    """
    correlations = correlations or {}
    # A feature may be constant over the unmasked time steps.
    known = {
        feature
        for features in correlations.values()
        for feature, r in features.items()
        if np.isfinite(r).any()
    }
    data = {
        "tokens": tokens,
        "separate": tokens is None or not are_characters(tokens),
        "variance": {
            name: _to_json(_finite(values).var(axis=0).filled(0), 6)
            for name, values in arrays.items()
        },
        "correlations": {
            name: {key: _to_json(r, 3) for key, r in features.items() if key in known}
            for name, features in correlations.items()
        },
        **quantize(arrays),
    }
    values = {
        "layer": html.escape("".join(c if c.isprintable() else "�" for c in layer)),
        # No `<` may end the script element.
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    template = resources.files(__package__).joinpath("report.html").read_text("utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], template)


def quantize(arrays):
    """Quantize and compress the arrays for the script in the report.

    The error is at most half a quantization step, `(high - low) / levels / 2`. If `h`
    is `o * tanh(c)`, the script computes it from the quantized `o` and `c`.

    Returns:
        Dict of values for JSON: `time`, `units`, `levels`; `stored`, the names of
        the stored arrays; `low` and `high`, base64 of float32 of shape
        `(array, unit)`; `values`, base64 of zlib-compressed bytes of shape
        `(array, unit, time)`, 255 where a value is not finite.
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
    limit = max(_SIZE_LIMIT, _SIZE_LIMIT_PER_VALUE * values[0].size)
    for levels in _LEVELS:
        codes = np.rint(share * levels).filled(_MISSING).astype("uint8")
        packed = _base64(zlib.compress(codes.tobytes()))
        if len(packed) <= limit:
            break
    return {
        "time": values.shape[2],
        "units": values.shape[1],
        "levels": levels,
        "stored": stored,
        "low": _base64(low.tobytes()),
        "high": _base64(high.tobytes()),
        "values": packed,
    }


def _finite(values):
    return np.ma.masked_invalid(values.astype("float64"))


def _to_json(array, digits):
    return [None if np.isnan(x) else round(float(x), digits) for x in array]


def _base64(data):
    return base64.b64encode(data).decode("ascii")
