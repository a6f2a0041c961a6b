"""Colors, axes and labels that the plots share."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from keras_scratch_lstm import _validation
from keras_scratch_lstm.tracing.tokens import line_layout, tokens_of_sample

_WIDTH = 9  # inches
MAX_LABELS = 100
_DPI = 150
_LINE = 88  # characters per line of text
# The palette of Okabe and Ito, which is safe for color-blind readers.
STYLES = {
    "i": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "f": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "o": {"color": "#009E73", "linestyle": ":", "marker": "^"},
    "c_tilde": {"color": "#D55E00", "linestyle": ":", "marker": "v"},
    "c": {"color": "black", "linestyle": "-", "marker": "o"},
    "h": {"color": "#CC79A7", "linestyle": "--", "marker": "s"},
}
GATES = ("i", "f", "o")
DIVERGING = LinearSegmentedColormap.from_list("", ["#D55E00", "white", "#0072B2"])
TITLES = {
    "i": "input gate i",
    "f": "forget gate f",
    "o": "output gate o",
    "c_tilde": "candidate cell state c̃",
    "c": "cell state c",
    "h": "hidden state h",
}


def select(trace, sample, steps, tokens):
    """Return the index of the sample, the selected time steps, and their tokens."""
    batch, time, _ = trace.i.shape
    sample = _validation.integer("sample", sample, 0, batch - 1)
    selected = _validation.select("steps", steps, time)
    if tokens is not None:
        tokens = tokens_of_sample(tokens, batch, time, sample)
        tokens = [tokens[step] for step in selected]
    return sample, selected, tokens


def color_tokens(values, labels, array, title, ax):
    labels = _visible(labels)
    boxes = line_layout(labels, _LINE)
    width, rows = max(x + w for x, _, w in boxes), boxes[-1][1] + 1
    ax = new_axes(0.9 + 0.23 * rows, ax)
    cells = PolyCollection(
        [[(x, y), (x + w, y), (x + w, y + 1), (x, y + 1)] for x, y, w in boxes],
        array=np.ma.masked_invalid(values),
        cmap=colormap(array),
        norm=normalize(array, values),
    )
    ax.add_collection(cells)
    font: dict[str, Any] = {"fontsize": 9, "family": "monospace", "parse_math": False}
    for label, (x, y, w), rgba in zip(
        labels, boxes, cells.to_rgba(values), strict=True
    ):
        is_dark = rgba[:3] @ [0.3, 0.59, 0.11] < 0.5
        text = ax.text(x + w / 2, y + 0.55, label, ha="center", va="center", **font)
        text.set_color("white" if is_dark else "black")
    ax.set(xlim=(0, max(width, _LINE * 0.7)), ylim=(rows, 0), xticks=[], yticks=[])
    ax.set_title(title, loc="left")
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(cells, ax=ax, pad=0.01, aspect=max(8, 1.5 * rows))
    return ax.figure


def colormap(array):
    colors = matplotlib.colormaps["viridis"] if array in GATES else DIVERGING
    return colors.with_extremes(bad="0.8")  # masked time steps


def normalize(array, values):
    """Return a range of 0 to 1 for gates, and a symmetric one for states."""
    finite = values[np.isfinite(values)]
    most = np.abs(finite).max(initial=0) or 1
    if array in GATES:
        return Normalize(finite.min(initial=0), max(1, most))
    return Normalize(-most, most)


def integer_locator():
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)


def new_figure(height, figure=None):
    """Return `figure`, or a new one."""
    if figure is None:
        return Figure(figsize=(_WIDTH, height), layout="constrained")
    if not isinstance(figure, FigureBase):
        raise _validation.invalid("figure", figure, "a `matplotlib.figure.Figure`")
    return figure


def new_axes(height, ax):
    """Return `ax`, or the axes of a new figure."""
    if ax is None:
        return new_figure(height).subplots()
    if not isinstance(ax, Axes):
        raise _validation.invalid("ax", ax, "a `matplotlib.axes.Axes`")
    return ax


def time_positions(times, shape, sample=0):
    """Return where the time steps of a sample are on the time axis.

    Dates become matplotlib's numbers of days.
    """
    if times is None:
        return np.arange(shape[1])
    try:
        array = _validation.to_numpy(times)
    except (TypeError, ValueError):  # rows of different lengths
        array = np.array(None)
    if array.shape not in (shape, shape[1:]) or array.dtype.kind not in "Miuf":
        rule = f"dates or numbers of shape {shape[1:]} or {shape}"
        raise _validation.invalid("times", times, rule)
    array = array[sample] if array.shape == shape else array
    return dates.date2num(array) if array.dtype.kind == "M" else array


def label_time(ax, positions, tokens, times=None):
    """Label the time axis by dates, the tokens if there is room, or numbers."""
    if times is not None and _validation.to_numpy(times).dtype.kind == "M":
        locator = dates.AutoDateLocator()
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        return
    if times is not None or tokens is None or len(tokens) > MAX_LABELS:
        ax.set_xlabel("time step" if times is None else "time")
        ax.xaxis.set_major_locator(integer_locator())
        return
    ax.set_xticks(positions, _visible(tokens), family="monospace", parse_math=False)
    rotation = 90 if max(map(len, tokens)) > 1 else 0
    ax.tick_params(axis="x", length=0, labelsize=8, labelrotation=rotation)


def cell_edges(first, last, count):
    """Return the outer edges of a row of cells, from the centers of its ends."""
    half = (last - first) / (count - 1) / 2 if count > 1 else 0.5
    return first - half, last + half


def _visible(tokens):
    """Replace the control characters that a font can't draw."""
    table = str.maketrans({"\r": "", "\n": "⏎", "\t": "⇥"})
    return [token.translate(table) for token in tokens]


def save(figure, path):
    if path is not None:
        figure.savefig(_validation.path("path", path), dpi=_DPI)
    return figure
