"""Plots of attributions, gradients and ablations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keras_scratch_lstm import _validation
from keras_scratch_lstm._types import Path, Tokens
from keras_scratch_lstm.experiments import Ablation
from keras_scratch_lstm.plotting.figure import (
    DIVERGING,
    STYLES,
    cell_edges,
    color_tokens,
    integer_locator,
    label_time,
    new_axes,
    new_figure,
    save,
    time_positions,
)
from keras_scratch_lstm.tracing import Gradients
from keras_scratch_lstm.tracing.tokens import tokens_of_sample

_SERIES = 3  # above the heat map
_COLORS = ["#0072B2", "#E69F00", "#009E73"]


def plot_attribution(
    scores: Any,
    *,
    tokens: Tokens | None = None,
    inputs: Any = None,
    feature_names: Sequence[str] | None = None,
    times: Any = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot attribution scores: as colors of tokens, or of features against time.

    Args:
        scores: Array of shape `(time,)`, such as one sample's scores of
            `attribute`, summed over the features, for colored tokens.
            Or of shape `(time, features)` for a heat map. Or of shape
            `(batch, time, features)` for that of the mean absolute scores.
        tokens: See `plot_gates`.
        inputs: Array of the shape of `scores`, for one sample, the series to plot
            above the heat map: the three with the largest scores, each over its own
            range. Default: `None`.
        feature_names: List of strings, the names of the features.
        times: See `plot_gates`. They must be equally spaced.
        ax: See `plot_heatmap`. Cannot be combined with `inputs`.
        path: See `plot_gates`.
    """
    scores = _validation.to_numpy(scores)
    if scores.ndim not in (1, 2, 3) or not scores.size:
        rule = "of shape (time,), (time, features) or (batch, time, features)"
        raise _validation.invalid("scores", scores, rule)
    if scores.ndim > 1:
        return save(_plot_features(scores, inputs, feature_names, times, ax), path)
    labels = list(map(str, range(len(scores))))
    if tokens is not None:
        labels = tokens_of_sample(tokens, 1, len(scores), 0)
    return save(color_tokens(scores, labels, "scores", "attribution", ax), path)


def _plot_features(scores, inputs, names, times, ax):
    title = "attribution"
    if scores.ndim == 3:
        title = f"mean |attribution| of {len(scores)} samples"
        scores = np.abs(scores).mean(axis=0)
    time, features = scores.shape
    names = [f"feature {k}" for k in range(features)] if names is None else list(names)
    if len(names) != features:
        rule = f"a list of {features} names"
        raise _validation.invalid("feature_names", names, rule)
    x = time_positions(times, (1, time))
    height = 1 + 0.25 * features
    if inputs is None:
        ax = new_axes(height, ax)
    elif ax is None:
        rows = {"sharex": True, "height_ratios": [1.6, height]}
        above, ax = new_figure(1.6 + height).subplots(2, **rows)
        _plot_series(above, x, scores, inputs, names)
    else:
        raise _validation.invalid("ax", ax, "None if `inputs` is given")
    most = np.nanmax(np.abs(scores)) or 1
    extent = (*cell_edges(x[0], x[-1], time), features - 0.5, -0.5)
    colors = {"cmap": DIVERGING, "vmin": -most, "vmax": most}
    image = ax.imshow(
        scores.T, extent=extent, aspect="auto", interpolation="nearest", **colors
    )
    ax.set_yticks(range(features), names, parse_math=False)
    ax.tick_params(axis="y", length=0)
    label_time(ax, x, None, times)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=30, label=title)
    if title != "attribution":
        bar.ax.set_ylim(0, most)
    return ax.figure


def _plot_series(ax, x, scores, inputs, names):
    inputs = _validation.to_numpy(inputs)
    if inputs.shape != scores.shape:
        raise _validation.invalid("inputs", inputs, f"of shape {scores.shape}")
    largest = np.argsort(-np.abs(scores).sum(axis=0))[:_SERIES]
    for k, color in zip(largest, _COLORS, strict=False):
        low, high = np.nanmin(inputs[:, k]), np.nanmax(inputs[:, k])
        label = f"{names[k]}: {low:.4g} to {high:.4g}"
        share = (inputs[:, k] - low) / (high - low or 1)
        ax.plot(x, share, color=color, label=label, linewidth=1.4)
    ax.set(yticks=[])
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.figure.legend(frameon=False, loc="outside upper left", ncols=_SERIES)


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
    ax = new_axes(3.3, ax)
    for k, (name, trace) in enumerate(gradients.items()):
        for array, linestyle in (("h", "-"), ("c", "--")):
            norms = np.linalg.norm(getattr(trace, array), axis=-1)
            means = np.ma.masked_invalid(norms).mean(axis=0)
            if means.count():  # a `SimpleRNN` has no c
                label = f"{name}: |dL/d{array}|"
                style = {"color": _COLORS[k % 3], "linestyle": linestyle}
                ax.plot(means, label=label, **style)
    ax.set(yscale="log", xlabel="time step", ylabel="norm of the gradient")
    ax.xaxis.set_major_locator(integer_locator())
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return save(ax.figure, path)


def plot_ablation(
    ablation: Ablation,
    *,
    most: int = 20,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Plot the ablations that change the loss most, as bars with standard errors.

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
        pairs = zip(ablation.layer[rows], labels, strict=True)
        labels = [f"{layer}: {label}" for layer, label in pairs]
    ax = new_axes(0.8 + 0.2 * len(rows), ax)
    style = {"color": STYLES["f"]["color"], "ecolor": "0.4", "capsize": 2}
    ax.barh(labels, ablation.change[rows], xerr=ablation.error[rows], **style)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel(f"change of the loss (baseline: {ablation.baseline:.3g})")
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return save(ax.figure, path)
