"""Plots of the gates and states of a trace."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keras_scratch_lstm import _validation
from keras_scratch_lstm._types import Path, Selection, Tokens
from keras_scratch_lstm.plotting.figure import (
    GATES,
    MAX_LABELS,
    STYLES,
    TITLES,
    cell_edges,
    color_tokens,
    colormap,
    integer_locator,
    label_time,
    new_axes,
    new_figure,
    normalize,
    save,
    select,
    time_positions,
)
from keras_scratch_lstm.tracing.trace import SATURATED, GateTrace, check_array


def plot_gates(
    trace: GateTrace,
    *,
    units: Selection,
    arrays: Sequence[str] = GATES,
    tokens: Tokens | None = None,
    times: Any = None,
    sample: int = 0,
    steps: Selection = None,
    figure: Figure | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot gates and states of units over time.

    Args:
        trace: A `GateTrace`.
        units: Integer, slice or list of integers, the units to plot.
        arrays: List of strings, the gates and states to plot. Each unit has one row
            for gates and one for states. Default: the three gates.
        tokens: One sample's tokens (a string or a list of `time` strings), or a list
            of all samples' tokens. They label the time axis if there are at most
            100. Default: `None`, which shows the numbers of the time steps.
        times: Array of dates or numbers of shape `(time,)` or `(batch, time)`, the
            positions on the time axis. Default: `None`, the time steps.
        sample: Integer, the sample to plot. Default: `0`.
        steps: Integer, slice or list of integers, the time steps to plot. Default:
            `None`, all.
        figure: `matplotlib.figure.Figure` to plot into. Default: `None`, a new one.
        path: String or path-like, the file to save. Default: `None`.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    sample, steps, tokens = select(trace, sample, steps, tokens)
    positions = time_positions(times, trace.i.shape[:2], sample)
    x = positions[steps]
    units = _validation.select("units", units, trace.i.shape[-1])
    if isinstance(arrays, str) or not isinstance(arrays, Iterable):
        raise _validation.invalid("arrays", arrays, "a list of gates and states")
    names = [check_array(name) for name in arrays]
    groups = [[name for name in names if (name in GATES) == k] for k in (True, False)]
    panels = [(unit, group) for unit in units for group in groups if group]
    if not panels:
        raise _validation.invalid("arrays", arrays, "one or more gates and states")
    figure = new_figure(1.1 + 1.3 * len(panels), figure)
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for (unit, group), ax in zip(panels, rows, strict=True):
        values = {name: getattr(trace, name)[sample, steps, unit] for name in group}
        _plot_lines(ax, x, values)
        ax.set_ylabel(f"unit {unit}")
    margin = 0.7 * abs(positions[1] - positions[0]) if len(positions) > 1 else 0.7
    rows[-1].set_xlim(x.min() - margin, x.max() + margin)
    label_time(rows[-1], x, tokens, times)
    found: dict[str, Any] = {}  # one line for each array
    for ax in rows[: len(panels) // len(units)]:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    place: dict[str, Any] = {"loc": "outside upper right", "ncols": 3}
    figure.legend([*found.values()], [*found], frameon=False, **place)
    return save(figure, path)


def _plot_lines(ax, x, values):
    """Plot the gates, or the states, of one unit."""
    for name, line in values.items():
        options = STYLES[name] | {"markersize": 3, "linewidth": 1.4}
        if len(x) > MAX_LABELS:
            options |= {"marker": None, "linestyle": "-", "linewidth": 0.9}
        ax.plot(x, line, label=TITLES[name], **options)
    are_gates = not set(values).isdisjoint(GATES)
    for bound in SATURATED if are_gates else [0]:
        ax.axhline(bound, color="0.75", linewidth=0.8, zorder=0)
    if are_gates:
        ax.set(ylim=(-0.04, 1.04), yticks=[0, 0.5, 1])
    ax.tick_params(axis="x", length=0)
    ax.spines[["top", "right"]].set_visible(False)


def plot_heatmap(
    trace: GateTrace,
    *,
    array: str = "f",
    tokens: Tokens | None = None,
    times: Any = None,
    sample: int = 0,
    steps: Selection = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot one gate or state of all units over time as a heatmap.

    Args:
        trace: A `GateTrace`.
        array: String, one of `"i"`, `"f"`, `"o"`, `"c_tilde"`, `"c"` and `"h"`.
            Default: `"f"`.
        tokens: See `plot_gates`.
        times: See `plot_gates`. They must be equally spaced.
        sample: See `plot_gates`.
        steps: See `plot_gates`.
        ax: `matplotlib.axes.Axes` to plot into. Default: `None`, a new figure.
        path: See `plot_gates`.
    """
    sample, steps, tokens = select(trace, sample, steps, tokens)
    x = time_positions(times, trace.i.shape[:2], sample)[steps]
    values = getattr(trace, check_array(array))[sample, steps].T
    ax = new_axes(4.5, ax)
    # Between uneven time steps, there are empty columns.
    columns = steps - min(steps)
    columns //= np.gcd.reduce(columns) or 1
    full = np.full((len(values), max(columns) + 1), np.nan, values.dtype)
    full[:, columns] = values
    edges = cell_edges(x[columns.argmin()], x[columns.argmax()], full.shape[1])
    image = ax.imshow(
        full,
        aspect="auto",
        interpolation="nearest",
        cmap=colormap(array),
        norm=normalize(array, values),
        extent=(*edges, len(full) - 0.5, -0.5),
    )
    ax.set(ylabel="unit", title=TITLES[array])
    ax.yaxis.set_major_locator(integer_locator())
    label_time(ax, x, tokens, times)
    ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=30)
    return save(ax.figure, path)


def plot_saturation(
    trace: GateTrace, *, figure: Figure | None = None, path: Path | None = None
) -> Figure:
    """Plot how often the gates of each unit are saturated, one point per unit.

    The x-axis is the fraction of time steps at which the gate is below 0.1
    (left-saturated), the y-axis the fraction at which it is above 0.9
    (right-saturated). A unit whose forget gate is at the top left nearly always keeps
    its cell state; at the bottom right it nearly always resets it.

    Args:
        trace: A `GateTrace`.
        figure: See `plot_gates`.
        path: See `plot_gates`.

    References:

    - [Karpathy, Johnson and Li, 2015](https://arxiv.org/abs/1506.02078), figure 3
    """
    figure = new_figure(3.3, figure)
    low, high = SATURATED
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    for ax, (gate, fractions) in zip(axes, trace.saturation().items(), strict=True):
        ax.plot([0, 1], [1, 0], color="0.75", linewidth=0.8)  # left + right <= 1
        options = STYLES[gate] | {"linestyle": "", "markersize": 5, "clip_on": False}
        ax.plot(*fractions, **options, alpha=0.6, markeredgewidth=0, zorder=3)
        ax.set(title=TITLES[gate], xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"fraction of time steps above {high}")
    axes[1].set_xlabel(f"fraction of time steps below {low}")
    return save(figure, path)


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
    sample, steps, tokens = select(trace, sample, steps, tokens)
    unit = _validation.integer("unit", unit, 0, trace.i.shape[-1] - 1)
    values = getattr(trace, check_array(array))[sample, steps, unit]
    labels = [str(step) for step in steps] if tokens is None else tokens
    title = f"{TITLES[array]} of unit {unit}"
    return save(color_tokens(values, labels, array, title, ax), path)
