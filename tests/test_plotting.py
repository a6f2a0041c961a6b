import importlib
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.dates import date2num
from matplotlib.figure import Figure
from PIL import Image

from keras_scratch_lstm import Ablation, GateTrace, Gradients, plotting
from keras_scratch_lstm.tracing.trace import ARRAYS

pytestmark = pytest.mark.one_backend

TEXT = "The time $x_1$\nof it."
TIME, UNITS = len(TEXT), 6
UNIT = {"unit": 0, "tokens": TEXT}
GATES = ["input gate i", "forget gate f", "output gate o"]
HOURS = np.datetime64("2013-11-30T20", "h") + np.arange(6)


@pytest.fixture
def trace(rng):
    """A trace of two samples; time step 3 of the first is masked."""
    i, f, o = rng.random((3, 2, TIME, UNITS))
    c_tilde, c, h = rng.normal(size=(3, 2, TIME, UNITS))
    mask = np.ones((2, TIME), bool)
    mask[0, 3] = False
    for values in (arrays := [i, f, o, c_tilde, c, h]):
        values[~mask] = np.nan
    return GateTrace(*arrays, mask=mask, layer="lstm")


def tick_labels(ax):
    return [label.get_text() for label in ax.get_xticklabels()]


def text_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


WORDS = [f"word{k}" for k in range(TIME)]


@pytest.mark.parametrize(
    ("tokens", "labels", "rotation"),
    [
        (["a" * TIME, TEXT], list(TEXT.replace("\n", "⏎")), 0),
        (WORDS, WORDS, 90),
    ],
    ids=["characters", "words"],
)
def test_tokens_label_the_time_axis(tokens, labels, rotation, trace):
    for figure in (
        plotting.plot_gates(trace, units=0, tokens=tokens, sample=1),
        plotting.plot_heatmap(trace, array="c", tokens=tokens, sample=1),
    ):
        assert tick_labels(figure.axes[0]) == labels
        rotations = {t.get_rotation() for t in figure.axes[0].get_xticklabels()}
        assert rotations == {rotation}
    assert text_of(plotting.plot_text(trace, unit=0, tokens=tokens, sample=1)) == labels


def test_time_steps_are_numbered_without_tokens():
    trace = GateTrace(*[np.zeros((1, 300, 2))] * 6)
    for ax in (
        plotting.plot_gates(trace, units=0).axes + plotting.plot_heatmap(trace).axes[:1]
    ):
        assert ax.get_xlabel() == "time step"
        assert len(tick_labels(ax)) < 20
    figure = plotting.plot_text(trace, unit=0, steps=slice(7, None, 100))
    assert text_of(figure) == ["7", "107", "207"]


@pytest.mark.parametrize("array", ["f", "c_tilde"])
def test_plot_heatmap_has_values(array, trace):
    steps = slice(None, None, 2)
    figure = plotting.plot_heatmap(
        trace, array=array, tokens=TEXT, sample=1, steps=steps
    )
    ax, bar = figure.axes
    (image,) = ax.get_images()
    expected = getattr(trace, array)[1, ::2].T
    np.testing.assert_array_equal(image.get_array(), expected)
    low, high = image.get_clim()
    assert high >= np.abs(expected).max()
    assert (low, high) == (0, 1) if array in "ifo" else low == -high
    assert bar.get_ylim() == (low, high)
    left, right, *_ = image.get_extent()
    centers = np.linspace(left, right, 2 * expected.shape[1] + 1)[1::2]
    np.testing.assert_allclose(centers, range(TIME)[::2])
    assert ax.get_title().endswith({"c_tilde": "c̃"}.get(array, array))


def test_masked_time_steps_are_gray(trace):
    (image,) = plotting.plot_heatmap(trace, array="f").axes[0].get_images()
    (cells,) = plotting.plot_text(trace, unit=0, tokens=TEXT).axes[0].collections
    heatmap = image.to_rgba(image.get_array())
    cells.update_scalarmappable()
    for colors in (heatmap[0], heatmap[-1], cells.get_facecolors()):
        is_gray = (colors == [0.8, 0.8, 0.8, 1]).all(-1)
        assert np.flatnonzero(is_gray).tolist() == [3]


def test_plot_saturation_has_one_point_per_unit(trace):
    figure = plotting.plot_saturation(trace)
    assert [ax.get_title() for ax in figure.axes] == GATES
    counted = trace.mask.sum()
    for ax, name in zip(figure.axes, "ifo", strict=True):
        values = getattr(trace, name)[trace.mask]
        points = ax.get_lines()[-1]
        np.testing.assert_allclose(points.get_xdata(), (values < 0.1).sum(0) / counted)
        np.testing.assert_allclose(points.get_ydata(), (values > 0.9).sum(0) / counted)
        assert ax.get_xlim() == ax.get_ylim() == (0, 1)


def test_plot_text_colors_tokens_by_values(trace):
    ax = (figure := Figure()).subplots()
    plotting.plot_text(trace, unit=2, tokens=TEXT, array="f", sample=1, ax=ax)
    (cells,) = ax.collections
    values = trace.f[1, :, 2]
    np.testing.assert_array_equal(cells.get_array(), values)
    assert "".join(text_of(figure)) == TEXT.replace("\n", "⏎")
    cells.update_scalarmappable()
    colors = cells.get_facecolors()
    np.testing.assert_allclose(colors, cells.cmap(cells.norm(values)))
    for text, path, color in zip(ax.texts, cells.get_paths(), colors, strict=True):
        assert path.get_extents().contains(*text.get_position())
        gray = color[:3] @ [0.3, 0.59, 0.11]
        assert text.get_color() == ("white" if gray < 0.5 else "black")
    assert ax.get_title(loc="left").endswith(" f of unit 2")


def test_lines_break_between_words():
    text = "an ordinary word " * 20 + "\n" + "x" * 200
    trace = GateTrace(*[np.zeros((1, len(text), 1))] * 6)
    lines = {}
    for letter in plotting.plot_text(trace, unit=0, tokens=text).axes[0].texts:
        lines.setdefault(letter.get_position()[1], []).append(letter.get_text())
    lines = ["".join(line) for line in lines.values()]
    assert "".join(lines) == text.replace("\n", "⏎")
    assert max(map(len, lines)) <= 88
    assert all(line.endswith((" ", "⏎")) for line in lines[:4])
    assert lines[-3:] == ["x" * 88, "x" * 88, "x" * 24]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("gates", {"units": [0, 1]}), ("heatmap", {}), ("saturation", {}), ("text", UNIT)],
)
def test_saved_plots_are_not_clipped(name, arguments, trace, tmp_path):
    plot = getattr(plotting, f"plot_{name}")
    figure = plot(trace, **arguments, path=tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width == 1350
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert 0 <= box.x0 < box.x1 <= width
    assert 0 <= box.y0 < box.y1 <= height
    if name == "text":
        plot(trace, **arguments, path=tmp_path / "plot.svg")
        assert "<svg" in (tmp_path / "plot.svg").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("gates", {"units": 6}, "that selects some of 6. Received: units=6"),
        ("gates", {"units": []}, r"Received: units=\[\]"),
        ("gates", {"units": 0, "tokens": "ab"}, "`tokens` must have 21 tokens"),
        ("gates", {"units": 0, "arrays": ["x"]}, "`array` must be one of 'i', 'f'"),
        ("gates", {"units": 0, "arrays": "c"}, "`arrays` must be a list of gates"),
        ("gates", {"units": 0, "arrays": []}, "`arrays` must be one or more"),
        ("heatmap", {"times": ["a"] * TIME}, "`times` must be dates or numbers"),
        ("text", {"unit": [0]}, r"Received: unit=\[0\]"),
        ("heatmap", {"sample": 2}, "Received: sample=2"),
        ("heatmap", {"steps": slice(50, 60)}, "selects some of 21. Received"),
        ("saturation", {"path": 3}, "Received: path=3"),
    ],
)
def test_invalid_arguments_raise_error(name, arguments, match, trace):
    with pytest.raises(ValueError, match=match):
        getattr(plotting, f"plot_{name}")(**{"trace": trace} | arguments)


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="Run `pip install matplotlib`"):
        importlib.reload(plotting)


def test_plot_attribution_has_scores(rng):
    scores = rng.normal(size=TIME)
    figure = plotting.plot_attribution(scores, tokens=TEXT)
    assert text_of(figure) == list(TEXT.replace("\n", "⏎"))
    (cells,) = figure.axes[0].collections
    np.testing.assert_array_equal(cells.get_array(), scores)
    assert text_of(plotting.plot_attribution(scores[:2])) == ["0", "1"]
    with pytest.raises(ValueError, match=r"`scores` must be .* \(time,\)"):
        plotting.plot_attribution(scores[0])


def test_plot_attribution_of_features(rng):
    scores, inputs = rng.normal(size=(2, 3, 6, 5))
    scores[0, :, 3] = 9  # the largest
    names, times = list("abcde"), HOURS
    report = {"feature_names": names, "times": times}
    figure = plotting.plot_attribution(scores[0], inputs=inputs[0], **report)
    above, ax, _ = figure.axes
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array(), scores[0].T)
    assert image.get_clim() == (-9, 9)
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert ax.get_xlabel() == ""  # dates
    left, right, *_ = image.get_extent()
    assert left == pytest.approx(date2num(times[0]) - 1 / 48)
    assert right == pytest.approx(date2num(times[-1]) + 1 / 48)
    order = np.argsort(-np.abs(scores[0]).sum(axis=0))[:3]
    for line, k in zip(above.get_lines(), order, strict=True):
        assert line.get_label().startswith(f"{names[k]}: ")
        r = np.corrcoef(line.get_ydata(), inputs[0, :, k])[0, 1]
        assert r == pytest.approx(1)
    figure = plotting.plot_attribution(scores)
    (image,) = figure.axes[0].get_images()
    np.testing.assert_allclose(image.get_array(), np.abs(scores).mean(axis=0).T)
    assert figure.axes[1].get_ylim() == (0, image.get_array().max())
    assert figure.axes[0].get_xlabel() == "time step"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"inputs": np.zeros((6, 4))}, r"`inputs` must be of shape \(6, 5\)"),
        ({"feature_names": ["a"]}, "`feature_names` must be a list of 5 names"),
        ({"times": HOURS[:2]}, r"`times` must be dates or numbers of shape \(6,\)"),
        ({"inputs": np.zeros((6, 5)), "ax": Figure().subplots()}, "`ax` must be None"),
    ],
)
def test_invalid_series_raise_error(arguments, match, rng):
    with pytest.raises(ValueError, match=match):
        plotting.plot_attribution(rng.normal(size=(6, 5)), **arguments)


def test_states_and_dates(trace):
    times = np.datetime64("2013-11-30") + np.arange(2 * TIME).reshape(2, TIME)
    arrays = ["f", "h", "c"]
    options = {"arrays": arrays, "times": times, "sample": 1}
    figure = plotting.plot_gates(trace, units=[4, 1], steps=slice(2, 20), **options)
    for k, ax in enumerate(figure.axes):
        unit = (4, 1)[k // 2]
        assert ax.get_ylabel() == f"unit {unit}"
        lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 18]
        for line, name in zip(lines, (["f"], ["h", "c"])[k % 2], strict=True):
            np.testing.assert_array_equal(line.get_xdata(), date2num(times[1, 2:20]))
            expected = getattr(trace, name)[1, 2:20, unit]
            np.testing.assert_array_equal(line.get_ydata(), expected)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["forget gate f", "hidden state h", "cell state c"]
    figure = plotting.plot_gates(trace, units=4)  # distinguishable without colors
    lines = [line for line in figure.axes[0].get_lines() if line.get_label() in GATES]
    styles = {(line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(styles) > 2


def test_unselected_time_steps_are_empty(trace):
    times = np.datetime64("2013-11-30") + np.arange(TIME)
    figure = plotting.plot_heatmap(trace, sample=1, steps=[8, 2, 4], times=times)
    (image,) = figure.axes[0].get_images()
    values, f = image.get_array(), trace.f[1].T
    np.testing.assert_array_equal(values[:, [0, 1, 3]], f[:, [2, 4, 8]])
    assert np.ma.getmaskarray(values)[:, 2].all()
    left, right, *_ = image.get_extent()
    start = date2num(times[0])
    assert (left, right) == (start + 1, start + 9)


def test_plots_are_drawn_into_what_is_given(trace, rng):
    whole = Figure()
    left, right = whole.subfigures(1, 2)
    assert plotting.plot_gates(trace, units=[0, 3], figure=left) is left
    assert plotting.plot_saturation(trace, figure=right) is right
    assert [len(part.axes) for part in (left, right)] == [2, 3]
    for scores in (rng.normal(size=TIME), rng.normal(size=(TIME, 2))):
        ax, other = (figure := Figure()).subplots(1, 2)
        assert plotting.plot_attribution(scores, ax=ax) is figure
        assert ax.has_data()
        assert not other.has_data()


def test_plot_gradients_has_norms(trace):
    nan = np.full_like(trace.h, np.nan)
    simple = Gradients(*[nan] * 5, h=trace.i)
    lstm = Gradients(**{name: getattr(trace, name) for name in ARRAYS})
    figure = plotting.plot_gradients({"LSTM": lstm, "RNN": simple})
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert list(lines) == ["LSTM: |dL/dh|", "LSTM: |dL/dc|", "RNN: |dL/dh|"]
    norms = np.sqrt((trace.c**2).sum(axis=-1))
    np.testing.assert_allclose(lines["LSTM: |dL/dc|"], np.nanmean(norms, axis=0))
    assert plotting.plot_gradients(lstm).axes[0].get_yscale() == "log"


def test_plot_ablation_has_the_largest_changes():
    metric = np.array([1.0, 0.2, 1.3])
    layer, array = np.array(["lstm"] * 3), np.array(["h", "f", "f"])
    ablation = Ablation(1.0, layer, array, np.arange(3), metric, 0.1 * metric)
    (ax,) = plotting.plot_ablation(ablation, most=2).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "f, unit 1",
        "f, unit 2",
    ]
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, [-0.8, 0.3])
    with pytest.raises(ValueError, match="`most` must be a positive integer"):
        plotting.plot_ablation(ablation, most=0)
