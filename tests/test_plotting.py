import importlib
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure
from PIL import Image

from keras_scratch_lstm import GateTrace, plotting
from keras_scratch_lstm.tracing.trace import ARRAYS

pytestmark = pytest.mark.one_backend

TEXT = "The time $x_1$\nof it."
TIME, UNITS = len(TEXT), 6
GATES = ["input gate i", "forget gate f", "output gate o"]


@pytest.fixture
def trace(rng):
    shape = 2, TIME, UNITS
    i, f, o = rng.random((3, *shape))
    c_tilde, c, h = rng.normal(size=(3, *shape))
    arrays = dict(zip(ARRAYS, (i, f, o, c_tilde, c, h), strict=True))
    return GateTrace(**arrays, layer="lstm")


def masked(trace):
    arrays = {name: getattr(trace, name).copy() for name in ARRAYS}
    mask = np.ones((2, TIME), bool)
    mask[0, 3] = False
    for values in arrays.values():
        values[~mask] = np.nan
    return GateTrace(**arrays, mask=mask, layer="lstm")


def tick_labels(ax):
    return [label.get_text() for label in ax.get_xticklabels()]


def test_gates_of_units_over_a_text(trace):
    figure = plotting.plot_gates(trace, [4, 1], TEXT, sample=1, steps=slice(2, 20))
    assert [ax.get_ylabel() for ax in figure.axes] == ["unit 4", "unit 1"]
    for ax, unit in zip(figure.axes, (4, 1), strict=True):
        lines = {line.get_label(): line for line in ax.get_lines()}
        for label, name in zip(GATES, "ifo", strict=True):
            np.testing.assert_array_equal(lines[label].get_xdata(), range(2, 20))
            expected = getattr(trace, name)[1, 2:20, unit]
            np.testing.assert_array_equal(lines[label].get_ydata(), expected)
        low, high = ax.get_ylim()
        assert low < 0
        assert high > 1
    assert tick_labels(figure.axes[-1]) == list(TEXT[2:20].replace("\n", "⏎"))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == GATES
    # The lines differ in more than their colours.
    styles = {(line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(styles) >= 3


def test_without_tokens_steps_are_numbered(trace):
    (ax,) = plotting.plot_gates(trace, 0).axes
    assert ax.get_xlabel() == "step"
    long = GateTrace(**{name: np.zeros((1, 300, 2)) for name in ARRAYS})
    figure = plotting.plot_gates(long, 0, "a" * 300)  # no room for so many
    assert figure.axes[0].get_xlabel() == "step"
    assert len(tick_labels(figure.axes[0])) < 20


def test_words_stand_upright(trace):
    words = [f"word{step}" for step in range(TIME)]
    (ax,) = plotting.plot_gates(trace, 0, words).axes
    assert tick_labels(ax) == words
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {90}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_heat_map_has_the_numbers(name, trace):
    figure = plotting.plot_heatmap(trace, name, TEXT, steps=slice(None, None, 2))
    ax, bar = figure.axes
    (image,) = ax.get_images()
    expected = getattr(trace, name)[0, ::2].T
    np.testing.assert_array_equal(image.get_array(), expected)
    assert image.get_clim()[1] >= np.abs(expected).max()
    low, high = image.get_clim()
    assert (low, high) == (0, 1) if name in "ifo" else low == -high
    assert ax.get_title().endswith({"c_tilde": "c̃"}.get(name, name))
    assert ax.get_ylabel() == "unit"
    assert bar.get_ylim() == (low, high)


def test_a_heat_map_on_axes_of_ones_own(trace):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plotting.plot_heatmap(trace, "c", ax=right) is figure
    assert len(right.get_images()) == 1
    assert not left.get_images()


def test_masked_steps_have_no_colour(trace):
    (ax, _) = plotting.plot_heatmap(masked(trace), "f").axes
    (image,) = ax.get_images()
    hidden = np.ma.getmaskarray(image.get_array())
    assert hidden[:, 3].all()
    assert not np.delete(hidden, 3, axis=1).any()
    figure = plotting.plot_text(masked(trace), 0, TEXT)
    hidden = np.ma.getmaskarray(figure.axes[0].collections[0].get_array())
    assert np.flatnonzero(hidden).tolist() == [3]


def test_the_saturation_scatter_has_a_point_a_unit(trace):
    figure = plotting.plot_saturation(trace)
    assert [ax.get_title() for ax in figure.axes] == GATES
    for ax, (left, right) in zip(figure.axes, trace.saturation().values(), strict=True):
        (points,) = ax.collections
        np.testing.assert_array_equal(points.get_offsets(), np.stack([left, right], 1))
        assert ax.get_xlabel() == "share of steps below 0.1"
        assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    assert figure.axes[0].get_ylabel() == "share of steps above 0.9"


@pytest.mark.parametrize("name", ["c", "f"])
def test_text_is_coloured_by_a_units_values(name, trace):
    figure = plotting.plot_text(trace, 2, TEXT, name, sample=1)
    ax = figure.axes[0]
    (cells,) = ax.collections
    values = getattr(trace, name)[1, :, 2]
    np.testing.assert_array_equal(cells.get_array(), values)
    assert "".join(text.get_text() for text in ax.texts) == TEXT.replace("\n", "⏎")
    figure.draw_without_rendering()
    colours = cells.get_facecolors()
    np.testing.assert_allclose(colours, cells.cmap(cells.norm(values)))
    # Each letter is within its cell, and stands out from it.
    for text, path, colour in zip(ax.texts, cells.get_paths(), colours, strict=True):
        box = path.get_extents()
        assert box.contains(*text.get_position())
        grey = colour[:3] @ [0.3, 0.59, 0.11]
        assert text.get_color() == ("white" if grey < 0.5 else "black")
    assert ax.get_title(loc="left").endswith(f" {name} of unit 2")


def test_lines_break_between_words(rng):
    text = "an ordinary word " * 20 + "\n" + "x" * 200
    trace = GateTrace(**{name: np.zeros((1, len(text), 1)) for name in ARRAYS})
    ax = plotting.plot_text(trace, 0, text).axes[0]
    lines = {}
    for letter in ax.texts:
        lines.setdefault(letter.get_position()[1], []).append(letter.get_text())
    lines = ["".join(line) for line in lines.values()]
    assert "".join(lines) == text.replace("\n", "⏎")
    assert max(map(len, lines)) <= 88
    assert all(line.endswith((" ", "⏎")) for line in lines[:4])
    assert lines[-3:] == ["x" * 88, "x" * 88, "x" * 24]


def test_words_are_cells_of_their_own(trace):
    words = [f"<word{step}>" for step in range(TIME)]
    ax = plotting.plot_text(trace, 0, words).axes[0]
    assert [text.get_text() for text in ax.texts] == words
    widths = [path.get_extents().width for path in ax.collections[0].get_paths()]
    assert widths == [len(word) + 1 for word in words]


@pytest.mark.parametrize(
    "draw",
    [
        lambda trace, path: plotting.plot_gates(trace, [0, 1], TEXT, path=path),
        lambda trace, path: plotting.plot_heatmap(trace, "f", TEXT, path=path),
        lambda trace, path: plotting.plot_saturation(trace, path=path),
        lambda trace, path: plotting.plot_text(trace, 0, TEXT, path=path),
    ],
    ids=["gates", "heatmap", "saturation", "text"],
)
def test_pictures_are_saved_and_nothing_is_cut_off(draw, trace, tmp_path):
    figure = draw(trace, tmp_path / "picture.png")
    assert isinstance(figure, Figure)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == 1350
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    draw(trace, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text("utf-8")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda t: plotting.plot_gates(t, 6),
            "`unit` is 6; expected an integer from 0 to 5",
        ),
        (lambda t: plotting.plot_gates(t, [0, -1]), "`units` is -1; expected"),
        (lambda t: plotting.plot_gates(t, []), r"`units` is \[\]; expected"),
        (lambda t: plotting.plot_gates(t, "a"), "`unit` is 'a'; expected"),
        (
            lambda t: plotting.plot_gates(t, 0, "ab"),
            "`tokens` has 2 tokens; expected 21",
        ),
        (lambda t: plotting.plot_gates(t, 0, sample=2), "`sample` is 2; expected"),
        (
            lambda t: plotting.plot_gates(t, 0, steps=3),
            "`steps` is 3; expected a slice",
        ),
        (
            lambda t: plotting.plot_heatmap(t, steps=slice(50, 60)),
            "expected some of the 21 steps",
        ),
        (
            lambda t: plotting.plot_heatmap(t, "g"),
            "`name` is 'g'; expected one of 'i', 'f'",
        ),
        (lambda t: plotting.plot_text(t, 0, None), "`tokens` is None; expected"),
    ],
)
def test_wrong_arguments(draw, message, trace):
    with pytest.raises(ValueError, match=message):
        draw(trace)


def test_without_matplotlib_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r'`pip install "keras-scratch-lstm\[plot\]"`'
    ):
        importlib.reload(plotting)
