"""Pictures of gate traces, with matplotlib.

Each function returns the `Figure`, and saves it where a `path` is given.

Example:

>>> import keras, numpy as np
>>> from keras_scratch_lstm import trace_gates
>>> from keras_scratch_lstm.plotting import plot_gates, plot_text
>>> x = np.ones((1, 4, 3), "float32")
>>> layer = keras.layers.LSTM(8)
>>> h = layer(x)
>>> trace = trace_gates(layer, x)
>>> figure = plot_gates(trace, [0, 5], tokens="time")
>>> [ax.get_ylabel() for ax in figure.axes]
['unit 0', 'unit 5']
>>> plot_text(trace, 5, "time").axes[0].get_title(loc="left")
'memory c of unit 5'
"""

try:
    import matplotlib
except ImportError:
    raise ImportError(
        "`keras_scratch_lstm.plotting` needs matplotlib: run "
        '`pip install "keras-scratch-lstm[plot]"`.'
    ) from None

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from keras_scratch_lstm import _validation
from keras_scratch_lstm._types import Path, Tokens
from keras_scratch_lstm.tracing.trace import (
    ARRAYS,
    SATURATED,
    GateTrace,
    check_sample,
    check_tokens,
)

WIDTH = 9  # inches
DPI = 150

# Okabe and Ito's colours, which the colour-blind can tell apart.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#E69F00", "#009E73"
_VERMILION = "#D55E00"
_STYLES = {
    "i": {"color": _ORANGE, "linestyle": "--", "marker": "s"},
    "f": {"color": _BLUE, "linestyle": "-", "marker": "o"},
    "o": {"color": _GREEN, "linestyle": ":", "marker": "^"},
}
_SIGNED = LinearSegmentedColormap.from_list("signed", [_VERMILION, "white", _BLUE])
_TITLES = {
    "i": "input gate i",
    "f": "forget gate f",
    "o": "output gate o",
    "c_tilde": "candidate memory c̃",
    "c": "memory c",
    "h": "hidden state h",
}
_MOST_TICKS = 100


def plot_gates(
    trace: GateTrace,
    units: int | Sequence[int],
    tokens: Tokens | None = None,
    sample: int = 0,
    steps: slice | None = None,
    path: Path | None = None,
) -> Figure:
    """The three gates of chosen units over a text, one row a unit.

    Args:
        trace: A `GateTrace`.
        units: Integer, or list of integers: the units to draw.
        tokens: The sample's tokens, to stand along the axis: a string, or a list
            of `time` strings. Default: `None`, numbers.
        sample: Integer, which sample of the batch. Default: 0.
        steps: `slice`, which steps to draw; some 100 can have their tokens
            below them. Default: `None`, all.
        path: Where to save the picture. Default: `None`.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: An argument does not fit.
    """
    sample, steps, tokens = _what_to_draw(trace, sample, steps, tokens)
    units = _check_units(trace, units)
    figure = Figure(figsize=(WIDTH, 1.1 + 1.3 * len(units)), layout="constrained")
    rows = figure.subplots(len(units), sharex=True, sharey=True, squeeze=False)[:, 0]
    for unit, ax in zip(units, rows, strict=True):
        for gate, style in _STYLES.items():
            values = getattr(trace, gate)[sample, steps, unit]
            options: dict[str, Any] = style | {"markersize": 3, "linewidth": 1.4}
            if len(steps) > _MOST_TICKS:
                options |= {"marker": None, "linewidth": 0.9}
            ax.plot(steps, values, label=_TITLES[gate], **options)
        for bound in SATURATED:
            ax.axhline(bound, color="0.75", linewidth=0.8, zorder=0)
        ax.set(ylim=(-0.04, 1.04), yticks=[0, 0.5, 1], ylabel=f"unit {unit}")
        ax.set_xlim(steps[0] - 0.7, steps[-1] + 0.7)
        ax.tick_params(axis="x", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    _put_tokens(rows[-1], steps, tokens)
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    return _save(figure, path)


def plot_heatmap(
    trace: GateTrace,
    name: str = "f",
    tokens: Tokens | None = None,
    sample: int = 0,
    steps: slice | None = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """One gate or state of all units over a text: units down, steps across.

    Args:
        trace: A `GateTrace`.
        name: String, one of `"i"`, `"f"`, `"o"`, `"c_tilde"`, `"c"` and `"h"`.
            Default: `"f"`.
        tokens: See `plot_gates`.
        sample: See `plot_gates`.
        steps: See `plot_gates`.
        ax: Matplotlib `Axes` to draw in. Default: `None`, a new figure.
        path: See `plot_gates`.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: An argument does not fit.
    """
    sample, steps, tokens = _what_to_draw(trace, sample, steps, tokens)
    values = getattr(trace, _check_name(name))[sample, steps].T
    figure, ax = _figure_of(ax, height=4.5)
    image = ax.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=_colours_of(name),
        norm=_range_of(name, values),
        extent=(steps[0] - 0.5, steps[-1] + 0.5, len(values) - 0.5, -0.5),
    )
    ax.set(ylabel="unit", title=_TITLES[name])
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(axis="x", length=0)
    _put_tokens(ax, steps, tokens)
    figure.colorbar(image, ax=ax, pad=0.01, aspect=30)
    return _save(figure, path)


def plot_saturation(trace: GateTrace, path: Path | None = None) -> Figure:
    """How often the gates of each unit are nearly shut, and nearly open.

    A point for each unit: across, the share of steps at which its gate is below
    0.1; up, the share at which it is above 0.9. A unit whose forget gate lies
    at the top left keeps its memory nearly always; one at the bottom right
    hardly has any; the gates of one at the origin are never quite one or the
    other.

    Args:
        trace: A `GateTrace`.
        path: Where to save the picture. Default: `None`.

    Returns:
        The `matplotlib.figure.Figure`.

    Reference:

    - [Karpathy, Johnson and Li, 2015](https://arxiv.org/abs/1506.02078),
      figure 3
    """
    _check_trace(trace)
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    low, high = SATURATED
    for ax, (gate, shares) in zip(
        figure.subplots(1, 3, sharex=True, sharey=True),
        trace.saturation().items(),
        strict=True,
    ):
        style = _STYLES[gate]
        ax.plot([0, 1], [1, 0], color="0.75", linewidth=0.8)  # no unit is beyond
        ax.scatter(
            shares.left,
            shares.right,
            s=22,
            color=style["color"],
            marker=style["marker"],
            alpha=0.6,
            linewidths=0,
            clip_on=False,
        )
        ticks = [0, 0.5, 1]
        ax.set(title=_TITLES[gate], xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.set(xticks=ticks, yticks=ticks)
        ax.set_xlabel(f"share of steps below {low}")
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"share of steps above {high}")
    return _save(figure, path)


def plot_text(
    trace: GateTrace,
    unit: int,
    tokens: Tokens,
    name: str = "c",
    sample: int = 0,
    steps: slice | None = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """The text itself, coloured by the memory of one unit.

    Args:
        trace: A `GateTrace`.
        unit: Integer.
        tokens: The sample's tokens: a string, or a list of `time` strings.
        name: See `plot_heatmap`. Default: `"c"`.
        sample: See `plot_gates`.
        steps: `slice`, which steps to draw. Default: `None`, all.
        ax: See `plot_heatmap`.
        path: See `plot_gates`.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: An argument does not fit.
    """
    sample, steps, tokens = _what_to_draw(trace, sample, steps, tokens)
    if tokens is None:
        raise ValueError("`tokens` is None; expected the tokens of the text.")
    unit = _validation.index("unit", unit, trace.i.shape[-1])
    values = getattr(trace, _check_name(name))[sample, steps, unit]
    places, rows = _set_type([_visible(token) for token in tokens])
    figure, ax = _figure_of(ax, height=0.9 + 0.23 * rows)
    norm = _range_of(name, values)
    cells = PolyCollection(
        [
            [(x, row), (x + width, row), (x + width, row + 1), (x, row + 1)]
            for x, row, width in places
        ],
        array=np.ma.masked_invalid(values),
        cmap=_colours_of(name),
        norm=norm,
    )
    ax.add_collection(cells)
    for token, (x, row, width), value in zip(tokens, places, values, strict=True):
        red, green, blue, _ = cells.cmap(norm(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        ax.text(
            x + width / 2,
            row + 0.55,
            _visible(token),
            ha="center",
            va="center",
            fontsize=9,
            family="monospace",
            color="white" if dark else "black",
            parse_math=False,
        )
    width = max(x + width for x, _, width in places)
    ax.set(xlim=(0, max(width, _LINE * 0.7)), ylim=(rows, 0), xticks=[], yticks=[])
    ax.set_title(f"{_TITLES[name]} of unit {unit}", loc="left")
    ax.spines[:].set_visible(False)
    figure.colorbar(cells, ax=ax, pad=0.01, aspect=max(8, 1.5 * rows))
    return _save(figure, path)


# --- what is drawn -----------------------------------------------------------


def _check_trace(trace):
    if not isinstance(trace, GateTrace):
        raise _validation.invalid("trace", trace, "a `GateTrace`")


def _what_to_draw(trace, sample, steps, tokens):
    _check_trace(trace)
    sample, time = check_sample(trace, sample), trace.i.shape[1]
    if tokens is not None:
        tokens = check_tokens(tokens, time)
    steps = slice(None) if steps is None else steps
    try:
        chosen = np.arange(time)[slice(*steps.indices(time))]
    except (AttributeError, TypeError, ValueError):  # no slice, or not of integers
        raise _validation.invalid("steps", steps, "a slice, or None") from None
    if not len(chosen):
        raise _validation.invalid("steps", steps, f"some of the {time} steps")
    return sample, chosen, tokens and [tokens[step] for step in chosen]


def _check_units(trace, units):
    size = trace.i.shape[-1]
    several = isinstance(units, (list, tuple, range)) or getattr(units, "ndim", 0)
    argument = "units" if several else "unit"
    units = list(units) if several else [units]
    if not units:
        raise _validation.invalid(argument, units, f"integers from 0 to {size - 1}")
    return [_validation.index(argument, unit, size) for unit in units]


def _check_name(name):
    if not isinstance(name, str) or name not in ARRAYS:
        raise ValueError(
            f"`name` is {name!r}; expected one of {', '.join(map(repr, ARRAYS))}."
        )
    return name


def _range_of(name, values):
    """From 0 to 1 for a gate, and as far to either side for what has a sign."""
    finite = values[np.isfinite(values)]
    most = np.abs(finite).max(initial=0) or 1
    if name in _STYLES:
        return Normalize(min(0, finite.min(initial=0)), max(1, most))
    return Normalize(-most, most)


def _colours_of(name):
    colours = matplotlib.colormaps["viridis"] if name in _STYLES else _SIGNED
    return colours.with_extremes(bad="0.8")  # a masked step


# --- how it is drawn ---------------------------------------------------------

_LINE = 88  # characters


def _figure_of(ax, height):
    if ax is not None:
        if not isinstance(ax, Axes):
            raise _validation.invalid("ax", ax, "`Axes` of matplotlib, or None")
        return ax.figure, ax
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _put_tokens(ax, steps, tokens):
    """Tokens along the axis, if there is room for them, else numbers."""
    if tokens is None or len(tokens) > _MOST_TICKS:
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        return
    words = max(map(len, tokens)) > 1
    ax.set_xticks(steps, [_visible(token) for token in tokens])
    for label in ax.get_xticklabels():
        label.set(family="monospace", parse_math=False, fontsize=9 if words else 8)
        if words:
            label.set_rotation(90)


def _visible(token):
    """A token as it can be drawn."""
    return token.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")


def _set_type(tokens):
    """Where each token stands: column, row and width; and the number of rows."""
    gap = max(map(len, tokens)) > 1  # the tokens are words
    widths = [max(1, len(token)) + gap for token in tokens]
    # What is not to be torn apart.
    runs, rest = [], []
    for token, width in zip(tokens, widths, strict=True):
        rest.append(width)
        ends_line = token.endswith("⏎")
        if gap or ends_line or not token.strip() or sum(rest) == _LINE:
            runs.append((rest, ends_line))
            rest = []
    places, x, row = [], 0, 0
    runs.append((rest, False))
    for run, ends_line in runs:
        if x and x + sum(run) > _LINE:
            x, row = 0, row + 1
        for width in run:
            places.append((x, row, width))
            x += width
        if ends_line:
            x, row = 0, row + 1
    return places, places[-1][1] + 1


def _save(figure, path):
    if path is not None:
        path = _validation.path("path", path)
        try:
            figure.savefig(path, dpi=DPI)
        except ValueError as error:
            raise _validation.invalid(
                "path", str(path), "an ending that matplotlib knows"
            ) from error
    return figure
