"""Plots of gate traces, with matplotlib.

Each function returns the `matplotlib.figure.Figure`, and saves it if `path` is given.

Example:

>>> import keras, numpy as np
>>> from keras_scratch_lstm import plotting, trace_gates
>>> layer = keras.layers.LSTM(8)
>>> h = layer(np.ones((1, 4, 3)))
>>> trace = trace_gates(layer, np.ones((1, 4, 3)))
>>> figure = plotting.plot_gates(trace, units=[0, 5], tokens="time")
>>> [ax.get_ylabel() for ax in figure.axes]
['unit 0', 'unit 5']
"""

try:
    import matplotlib
except ImportError:
    raise ImportError(
        "`keras_scratch_lstm.plotting` needs matplotlib. Run `pip install matplotlib`."
    ) from None

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from keras_scratch_lstm import _validation
from keras_scratch_lstm._types import Path, Selection, Tokens
from keras_scratch_lstm.experiments import Ablation
from keras_scratch_lstm.tracing.tokens import line_layout, tokens_of_sample
from keras_scratch_lstm.tracing.trace import (
    SATURATED,
    GateTrace,
    Gradients,
    check_array,
)

_WIDTH, _DPI = 9, 150  # inches, dots per inch
_INTEGERS: Any = {"nbins": "auto", "steps": [1, 2, 5, 10], "integer": True}
_LINE = 88  # characters per line of text
_MAX_TOKEN_LABELS = 100
# The palette of Okabe and Ito, which is safe for color-blind readers.
_STYLES = {
    "i": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "f": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "o": {"color": "#009E73", "linestyle": ":", "marker": "^"},
}
_DIVERGING = LinearSegmentedColormap.from_list("", ["#D55E00", "white", "#0072B2"])
_TITLES = {
    "i": "input gate i",
    "f": "forget gate f",
    "o": "output gate o",
    "c_tilde": "candidate cell state c̃",
    "c": "cell state c",
    "h": "hidden state h",
}


def plot_gates(
    trace: GateTrace,
    *,
    units: Selection,
    tokens: Tokens | None = None,
    sample: int = 0,
    steps: Selection = None,
    figure: Figure | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot the three gates of units over time, one row per unit.

    Args:
        trace: A `GateTrace`.
        units: Integer, slice or list of integers, the units to plot.
        tokens: One sample's tokens (a string or a list of `time` strings), or a list
            of all samples' tokens. They label the time axis if there are at most
            100. Default: `None`, which shows the numbers of the time steps.
        sample: Integer, the sample to plot. Default: `0`.
        steps: Integer, slice or list of integers, the time steps to plot. Default:
            `None`, all.
        figure: `matplotlib.figure.Figure` to plot into. Default: `None`, a new one.
        path: String or path-like, the file to save. Default: `None`.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    sample, steps, tokens = _select(trace, sample, steps, tokens)
    units = _validation.select("units", units, trace.i.shape[-1])
    figure = _figure(1.1 + 1.3 * len(units), figure)
    rows = figure.subplots(len(units), sharex=True, sharey=True, squeeze=False)[:, 0]
    for unit, ax in zip(units, rows, strict=True):
        for gate, style in _STYLES.items():
            values = getattr(trace, gate)[sample, steps, unit]
            options: dict[str, Any] = style | {"markersize": 3, "linewidth": 1.4}
            if len(steps) > _MAX_TOKEN_LABELS:
                options |= {"marker": None, "linestyle": "-", "linewidth": 0.9}
            ax.plot(steps, values, label=_TITLES[gate], **options)
        for bound in SATURATED:
            ax.axhline(bound, color="0.75", linewidth=0.8, zorder=0)
        ax.set(ylim=(-0.04, 1.04), yticks=[0, 0.5, 1], ylabel=f"unit {unit}")
        ax.set_xlim(min(steps) - 0.7, max(steps) + 0.7)
        ax.tick_params(axis="x", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    _label_time(rows[-1], steps, tokens)
    legend = rows[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper right", ncols=3, frameon=False)
    return _save(figure, path)


def plot_heatmap(
    trace: GateTrace,
    *,
    array: str = "f",
    tokens: Tokens | None = None,
    sample: int = 0,
    steps: Selection = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot one gate or state of all units over time as a heatmap.

    Args:
        trace: A `GateTrace`.
        array: String, the name of a gate or state. Default: `"f"`.
        tokens: See `plot_gates`.
        sample: See `plot_gates`.
        steps: See `plot_gates`.
        ax: `matplotlib.axes.Axes` to plot into. Default: `None`, a new figure.
        path: See `plot_gates`.
    """
    sample, steps, tokens = _select(trace, sample, steps, tokens)
    values = getattr(trace, check_array(array))[sample, steps].T
    # Between uneven time steps, there are empty columns.
    start, width = min(steps), np.gcd.reduce(np.diff(np.sort(steps))) or 1
    columns = (steps - start) // width
    full = np.full((len(values), max(columns) + 1), np.nan, values.dtype)
    full[:, columns] = values
    ax = _axes(4.5, ax)
    image = ax.imshow(
        full,
        aspect="auto",
        interpolation="nearest",
        cmap=_colormap(array),
        norm=_normalize(array, values),
        extent=(start - width / 2, max(steps) + width / 2, len(full) - 0.5, -0.5),
    )
    ax.set(ylabel="unit", title=_TITLES[array])
    ax.yaxis.set_major_locator(MaxNLocator(**_INTEGERS))
    _label_time(ax, steps, tokens)
    ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=30)
    return _save(ax.figure, path)


def plot_saturation(
    trace: GateTrace, *, figure: Figure | None = None, path: Path | None = None
) -> Figure:
    """Plot how often the gates of each unit are saturated, one point per unit.

    This is figure 3 of Karpathy, Johnson and Li; see `GateTrace.saturation`. A unit
    whose forget gate is at the top left nearly always keeps its cell state; at the
    bottom right it nearly always resets it.

    Args:
        trace: A `GateTrace`.
        figure: See `plot_gates`.
        path: See `plot_gates`.
    """
    figure = _figure(3.3, figure)
    low, high = SATURATED
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    for ax, (gate, fractions) in zip(axes, trace.saturation().items(), strict=True):
        ax.plot([0, 1], [1, 0], color="0.75", linewidth=0.8)  # left + right <= 1
        options = _STYLES[gate] | {"linestyle": "", "markersize": 5, "clip_on": False}
        ax.plot(*fractions, **options, alpha=0.6, markeredgewidth=0, zorder=3)
        ax.set(title=_TITLES[gate], xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"fraction of time steps above {high}")
    axes[1].set_xlabel(f"fraction of time steps below {low}")
    return _save(figure, path)


def plot_text(
    trace: GateTrace,
    *,
    unit: int,
    tokens: Tokens | None = None,
    array: str = "c",
    sample: int = 0,
    steps: Selection = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot the tokens, colored by a gate or state of one unit.

    Args:
        trace: A `GateTrace`.
        unit: Integer, the unit to plot.
        tokens: See `plot_gates`.
        array: See `plot_heatmap`. Default: `"c"`.
        sample: See `plot_gates`.
        steps: See `plot_gates`.
        ax: See `plot_heatmap`.
        path: See `plot_gates`.
    """
    sample, steps, tokens = _select(trace, sample, steps, tokens)
    unit = _validation.integer("unit", unit, 0, trace.i.shape[-1] - 1)
    values = getattr(trace, check_array(array))[sample, steps, unit]
    labels = [str(step) for step in steps] if tokens is None else tokens
    title = f"{_TITLES[array]} of unit {unit}"
    return _save(_color_tokens(values, labels, array, title, ax), path)


def plot_attribution(
    scores: Any,
    *,
    tokens: Tokens | None = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot the tokens, colored by their attribution scores.

    Args:
        scores: Array of shape `(time,)`, such as the sums over the features of one
            sample's `Attribution.scores`.
        tokens: See `plot_gates`.
        ax: See `plot_heatmap`.
        path: See `plot_gates`.
    """
    scores = _validation.to_numpy(scores)
    if scores.ndim != 1 or not scores.size:
        raise _validation.invalid("scores", scores, "an array of shape (time,)")
    labels = list(map(str, range(len(scores))))
    if tokens is not None:
        labels = tokens_of_sample(tokens, 1, len(scores), 0)
    return _save(_color_tokens(scores, labels, "scores", "attribution", ax), path)


def plot_gradients(
    gradients: Gradients | Mapping[str, Gradients],
    *,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot the norms of dL/dh_t (solid) and dL/dc_t (dashed) over time.

    Each line is the norm over the units, as the mean over the samples.

    Args:
        gradients: Result of `trace_gradients`, or a dict of name -> result.
        ax: See `plot_heatmap`.
        path: See `plot_gates`.
    """
    if isinstance(gradients, Gradients):
        gradients = {gradients.layer: gradients}
    ax = _axes(3.3, ax)
    colors = ["#0072B2", "#E69F00", "#009E73"]
    for k, (name, trace) in enumerate(gradients.items()):
        for array, linestyle in (("h", "-"), ("c", "--")):
            norms = np.linalg.norm(getattr(trace, array), axis=-1)
            means = np.ma.masked_invalid(norms).mean(axis=0)
            if means.count():  # a `SimpleRNN` has no c
                label = f"{name}: |dL/d{array}|"
                ax.plot(means, color=colors[k % 3], linestyle=linestyle, label=label)
    ax.set(yscale="log", xlabel="time step", ylabel="norm of the gradient")
    ax.xaxis.set_major_locator(MaxNLocator(**_INTEGERS))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return _save(ax.figure, path)


def plot_ablation(
    ablation: Ablation,
    *,
    most: int = 20,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot the ablations that change the loss most, as bars.

    Args:
        ablation: Result of `ablate_units`.
        most: Positive integer, the number of rows to plot. Default: 20.
        ax: See `plot_heatmap`.
        path: See `plot_gates`.
    """
    most = _validation.positive_integer("most", most)
    rows = np.argsort(-np.abs(ablation.change))[:most]
    labels = [f"{ablation.array[row]}, unit {ablation.unit[row]}" for row in rows]
    if len(set(ablation.layer)) > 1:  # the directions of a `Bidirectional` layer
        labels = [
            f"{ablation.layer[k]}: {x}" for k, x in zip(rows, labels, strict=True)
        ]
    ax = _axes(0.8 + 0.2 * len(rows), ax)
    ax.barh(labels, ablation.change[rows], color=_STYLES["f"]["color"])
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel(f"change of the loss (baseline: {ablation.baseline:.3g})")
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return _save(ax.figure, path)


def _select(trace, sample, steps, tokens):
    """Return the index of the sample, the selected time steps, and their tokens."""
    batch, time, _ = trace.i.shape
    sample = _validation.integer("sample", sample, 0, batch - 1)
    selected = _validation.select("steps", steps, time)
    if tokens is not None:
        tokens = tokens_of_sample(tokens, batch, time, sample)
        tokens = [tokens[step] for step in selected]
    return sample, selected, tokens


def _color_tokens(values, labels, array, title, ax):
    labels = _visible(labels)
    boxes = line_layout(labels, _LINE)
    width, rows = max(x + w for x, _, w in boxes), boxes[-1][1] + 1
    ax = _axes(0.9 + 0.23 * rows, ax)
    cells = PolyCollection(
        [[(x, y), (x + w, y), (x + w, y + 1), (x, y + 1)] for x, y, w in boxes],
        array=np.ma.masked_invalid(values),
        cmap=_colormap(array),
        norm=_normalize(array, values),
    )
    ax.add_collection(cells)
    font: dict[str, Any] = {"fontsize": 9, "family": "monospace", "parse_math": False}
    colors = cells.to_rgba(values)
    for label, (x, y, w), rgba in zip(labels, boxes, colors, strict=True):
        is_dark = rgba[:3] @ [0.3, 0.59, 0.11] < 0.5
        text = ax.text(x + w / 2, y + 0.55, label, ha="center", va="center", **font)
        text.set_color("white" if is_dark else "black")
    ax.set(xlim=(0, max(width, _LINE * 0.7)), ylim=(rows, 0), xticks=[], yticks=[])
    ax.set_title(title, loc="left")
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(cells, ax=ax, pad=0.01, aspect=max(8, 1.5 * rows))
    return ax.figure


def _colormap(array):
    colors = matplotlib.colormaps["viridis"] if array in _STYLES else _DIVERGING
    return colors.with_extremes(bad="0.8")  # masked time steps


def _normalize(array, values):
    """Return a range of 0 to 1 for gates, and a symmetric one for states."""
    finite = values[np.isfinite(values)]
    most = np.abs(finite).max(initial=0) or 1
    if array in _STYLES:
        return Normalize(finite.min(initial=0), max(1, most))
    return Normalize(-most, most)


def _figure(height, figure=None):
    """Return `figure`, or a new one."""
    if figure is None:
        return Figure(figsize=(_WIDTH, height), layout="constrained")
    if not isinstance(figure, FigureBase):
        raise _validation.invalid("figure", figure, "a `matplotlib.figure.Figure`")
    return figure


def _axes(height, ax):
    """Return `ax`, or the axes of a new figure."""
    if ax is None:
        return _figure(height).subplots()
    if not isinstance(ax, Axes):
        raise _validation.invalid("ax", ax, "a `matplotlib.axes.Axes`")
    return ax


def _label_time(ax, steps, tokens):
    """Label the time axis by the tokens if there is room, else by numbers."""
    if tokens is None or len(tokens) > _MAX_TOKEN_LABELS:
        ax.set_xlabel("time step")
        ax.xaxis.set_major_locator(MaxNLocator(**_INTEGERS))
        return
    ax.set_xticks(steps, _visible(tokens), family="monospace", parse_math=False)
    rotation = 90 if max(map(len, tokens)) > 1 else 0
    ax.tick_params(axis="x", length=0, labelsize=8, labelrotation=rotation)


def _visible(tokens):
    """Replace the control characters that a font can't draw."""
    table = str.maketrans({"\r": "", "\n": "⏎", "\t": "⇥"})
    return [token.translate(table) for token in tokens]


def _save(figure, path):
    if path is not None:
        figure.savefig(_validation.path("path", path), dpi=_DPI)
    return figure
