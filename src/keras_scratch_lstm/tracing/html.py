"""A gate trace as an HTML page to explore, in one file."""

import base64
import zlib
from importlib import resources

import numpy as np

from keras_scratch_lstm.tracing.trace import ARRAYS, check_sample, check_tokens

# Each number is rounded to one of so many steps between the least and the
# greatest of its unit; the finest that the page's size allows is taken.
_LEVELS = 254, 191, 127, 95, 63, 47, 31
_NO_NUMBER = 255
# Of the data, in base64: enough for 2,000 tokens of 256 units.
_BYTES = 2_900_000
_BYTES_A_NUMBER = _BYTES / (2000 * 256 * len(ARRAYS))


def render(trace, tokens, sample=0):
    """The page as a string; see `GateTrace.to_html`."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise ImportError(
            '`to_html` needs Jinja2: run `pip install "keras-scratch-lstm[plot]"`.'
        ) from None
    sample = check_sample(trace, sample)
    tokens = check_tokens(tokens, trace.i.shape[1])
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    source = resources.files(__package__).joinpath("report.html").read_text("utf-8")
    data = {"layer": trace.layer, "tokens": tokens, **encode(trace, sample)}
    template = environment.from_string(source)
    return template.render(layer=_visible(trace.layer), data=data)


def _visible(text):
    """Without what could turn the direction of the page's own words."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def encode(trace, sample):
    """One sample's numbers in few bytes, as the page's script reads them.

    Every number is off by half a step at most, `(high - low) / levels / 2` with
    its unit's `low` and `high`. Where h is o * tanh(c), it is left to the script
    to compute; it then is off by what o and c are, together, at most.

    Returns:
        Dict of what JSON knows: `units`; `levels`, the number of steps; `stored`,
        the names of the arrays; and in base64 `low` and `high`, float32 of
        shape `(array, unit)`, and `numbers`, zlib-compressed bytes of shape
        `(array, unit, time)`: each number's step, or 255 where it is masked or
        not finite.
    """
    arrays = {name: getattr(trace, name)[sample].T for name in ARRAYS}
    names = list(ARRAYS)
    if np.allclose(
        arrays["h"], arrays["o"] * np.tanh(arrays["c"]), atol=1e-5, equal_nan=True
    ):
        names.remove("h")
    numbers = np.stack([arrays[name] for name in names]).astype("float64")
    finite = np.isfinite(numbers)
    some = finite.any(-1)
    low = np.where(some, np.where(finite, numbers, np.inf).min(-1), 0)
    high = np.where(some, np.where(finite, numbers, -np.inf).max(-1), 0)
    low, high = low.astype("float32"), high.astype("float32")
    span = np.where(high > low, high - low, 1)[..., None]
    share = np.where(finite, (numbers - low[..., None]) / span, 0).clip(0, 1)
    budget = max(_BYTES, _BYTES_A_NUMBER * numbers[0].size * len(ARRAYS))
    for levels in _LEVELS:
        steps = np.where(finite, np.rint(share * levels), _NO_NUMBER).astype("uint8")
        packed = _base64(zlib.compress(steps.tobytes()))
        if len(packed) <= budget:
            break
    return {
        "units": trace.i.shape[-1],
        "levels": levels,
        "stored": names,
        "low": _base64(low.tobytes()),
        "high": _base64(high.tobytes()),
        "numbers": packed,
    }


def _base64(data):
    return base64.b64encode(data).decode("ascii")
