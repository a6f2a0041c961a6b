import base64
import html
import io
import json
import re
import shutil
import zlib

import numpy as np
import pytest

from keras_scratch_lstm import GateTrace
from keras_scratch_lstm.tracing.trace import ARRAYS

pytestmark = [pytest.mark.ci, pytest.mark.one_backend]

TEXT = 'The "Time" of 1895, (a\nsea) of it. I see: 7 Owls\n!'
UNITS = 5
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(1)>',
    "\u2028\u2029",
    "\x00\x1b[31m",
    "\u202egpj.exe",
    "\ud800",
    "{{ data }}{{ layer }}",
    "&lt;img src=x onerror=alert(1)&gt;",
    "",
]


def make_trace(rng, time, units=UNITS, samples=2, masked=(), layer="lstm", **changes):
    """Make a trace of random gates with `h = o * tanh(c)`."""
    shape = samples, time, units
    i, f, o = rng.random((3, *shape))
    c_tilde, c = rng.uniform(-1, 1, shape), rng.normal(size=shape)
    arrays = {"i": i, "f": f, "o": o, "c_tilde": c_tilde, "c": c}
    arrays = arrays | {"h": o * np.tanh(c)} | changes
    arrays = {name: array.astype("float32") for name, array in arrays.items()}
    mask = np.ones(shape[:2], bool)
    mask[:, list(masked)] = False
    for array in arrays.values():
        array[~mask] = np.nan
    return GateTrace(**arrays, mask=mask if masked else None, layer=layer)


@pytest.fixture
def trace(rng):
    return make_trace(rng, len(TEXT))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.html"


def read_data(path):
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, path.read_text("utf-8"), re.DOTALL)[1])


def unpack(text, dtype, *shape):
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def read_report(path, sample=0):
    """Decode the data of a sample independently of the report's script."""
    data = read_data(path)
    one = data["sequences"][sample]
    names, shape = one["stored"], (len(one["stored"]), data["units"], data["time"])
    codes = np.frombuffer(zlib.decompress(base64.b64decode(one["values"])), "uint8")
    low, high = (unpack(one[key], "<f4", *shape[:2], 1) for key in ("low", "high"))
    codes = codes.reshape(shape)
    values = low + (high - low) * (codes / one["levels"])
    values[codes == 255] = np.nan
    values = dict(zip(names, values.swapaxes(1, 2), strict=True))
    return data | one, {"h": values["o"] * np.tanh(values["c"])} | values


def assert_close(values, trace, sample, data):
    """Check that the error is at most half a quantization step."""
    expected = {name: getattr(trace, name)[sample] for name in ARRAYS}
    step = {name: np.ptp(expected[name], axis=0) / data["levels"] for name in ARRAYS}
    if "h" not in data["stored"]:
        step["h"] = step["o"] + step["c"]
    for name in ARRAYS:
        error = np.abs(values[name] - expected[name])
        assert (error <= step[name] / 2 + 1e-6).all(), name


@pytest.mark.parametrize(
    ("time", "units", "is_lstm", "levels"),
    [(50, 5, True, 254), (2000, 256, False, 31)],
)
def test_quantized_values_match_trace(time, units, is_lstm, levels, rng, path):
    samples = 3 if time == 50 else 1
    tokens = ["".join(rng.choice(list("abc d\n"), time)) for _ in range(samples)]
    changes = {} if is_lstm else {"h": rng.uniform(-3, 3, (samples, time, units))}
    trace = make_trace(rng, time, units, samples, **changes)
    trace.to_html(path, tokens, sample=samples - 1)
    assert path.stat().st_size < 3_000_000
    for sample in range(samples):
        data, values = read_report(path, sample)
        assert data["tokens"][sample] == list(tokens[sample])
        assert data["levels"] >= levels
        assert data["stored"] == list(ARRAYS[: 5 if is_lstm else 6])
        assert_close(values, trace, sample, data)


def test_inputs_and_scores_of_the_report(rng, path):
    """Of more than 24 features, the report has those of the largest scores."""
    inputs = rng.normal(size=(2, 6, 30))
    inputs[0, 2, 5] = np.nan
    scores = rng.normal(size=inputs.shape) * np.linspace(0.1, 10, 30)
    trace = make_trace(rng, 6)
    trace.to_html(path, inputs=inputs, scores=scores)
    data = read_data(path)
    order = np.sort(np.argsort(-np.abs(scores).mean(axis=(0, 1)))[:24])
    assert data["features"] == [f"feature {k}" for k in order]
    for name, values in (("inputs", inputs), ("scores", scores)):
        found = unpack(data[name], "<f4", 2, 24, 6).swapaxes(1, 2)
        np.testing.assert_array_equal(found, values[..., order].astype("float32"))


def test_hostile_names_and_tokens_are_escaped(rng, path):
    layer = "".join(HOSTILE)
    trace = make_trace(rng, len(HOSTILE), layer=layer)
    names = [f"{k} {text}" for k, text in enumerate(HOSTILE)]
    inputs = rng.normal(size=(2, len(HOSTILE), len(HOSTILE)))
    trace.to_html(path, HOSTILE, inputs=inputs, feature_names=names, times=HOSTILE)
    page = path.read_text("utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert "<img" not in page
    assert not re.search("[\x00\x1b\u2028\u2029\u202a-\u202e\u2066-\u2069]", page)
    assert read_data(path)["tokens"] == [HOSTILE]
    title = html.unescape(re.search("<title>Gates of (.*?)</title>", page)[1])
    assert title == "".join(c if c.isprintable() else "�" for c in layer)


X = np.zeros((2, len(TEXT), 3))


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokens": "ab"},
        {"sample": 2},
        {"inputs": X[:1]},
        {"inputs": [[1], [2, 3]]},
        {"scores": X},
        {"scores": X[..., :2], "inputs": X},
        {"feature_names": ["a", "a", "b"], "inputs": X},
        {"feature_names": ["a"]},
        {"times": [[1], [2, 3]]},
    ],
    ids=str,
)
def test_invalid_arguments_write_nothing(arguments, trace, path):
    with pytest.raises(ValueError, match=rf"^`{next(iter(arguments))}` must [^\n]+$"):
        trace.to_html(path, **arguments)
    assert not path.exists()


def test_large_trace_in_a_notebook_is_a_table(rng):
    trace = make_trace(rng, 200, 300, masked=[7], layer="<b>")
    shown = trace._repr_html_()
    assert len(shown) < 3000
    assert "Layer <code>&lt;b&gt;</code>: 2 samples, 200 time steps, 300 units" in shown
    row = re.search(r"<tr><td>f</td>(.*?)</tr>", shown)[1]
    f = trace.f[:, np.arange(200) != 7]
    expected = [f.mean(), f.min(), f.max(), (f < 0.1).mean(), (f > 0.9).mean()]
    found = [float(x) for x in re.findall(r"<td>([\d.]+)</td>", row)]
    np.testing.assert_allclose(found, expected, atol=6e-4)


# --- in a browser ------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("Chromium is not installed")
    options = {"executable_path": executable, "args": ["--no-sandbox"]}  # in containers
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, path):
    """Open a trace's report; no error and no request to elsewhere may occur."""
    contexts, errors, requests = [], [], []

    def visit(trace, tokens=None, width=1200, scheme="light", touch=False, **kwargs):
        trace.to_html(path, tokens, **kwargs)
        size = {"width": width, "height": 800}
        contexts.append(
            browser.new_context(viewport=size, color_scheme=scheme, has_touch=touch)
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        for event in ("console", "pageerror", "dialog"):
            page.on(event, lambda event: errors.append(str(event)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []
    assert set(requests) == {path.as_uri()}


def token(page, step):
    return page.locator(f".text span[data-step='{step}']").first


def number(text):
    return float(re.search(r"[+−]?\d+(\.\d+)?", text)[0].replace("−", "-"))


def assert_shows(page, trace, step, unit, sample=0, id="value"):
    """Check the six values at a time step, which have three decimals."""
    for name in ARRAYS:
        shown = page.inner_text(f"#{id}-{name}")
        assert re.fullmatch(r"−?\d+\.\d{3}", shown)
        tolerance = np.nanmax(np.abs(trace.c)) / 127 + 0.0005
        assert abs(number(shown) - getattr(trace, name)[sample, step, unit]) < tolerance
    where = page.inner_text("#where").split(", ")
    assert where[0] == f"time step {step}"
    assert f"unit {unit}" in where[-1]


def rgb(locator, attribute="backgroundColor"):
    style = f"(element) => getComputedStyle(element).{attribute}"
    return np.array(re.findall(r"\d+", locator.evaluate(style)), int)[:3]


def points(path):
    """Return the parts of an SVG path, each of shape `(points, 2)`."""
    parts = [re.findall(r"(-?[\d.]+),(-?[\d.]+)", part) for part in path.split("M")[1:]]
    return [np.array(part, float) for part in parts]


def paths(page, selector):
    return page.eval_on_selector_all(
        selector, "(found) => found.map((path) => path.getAttribute('d'))"
    )


def selected_line(page):
    (line,) = points(page.get_attribute("#chart path.selected", "d"))
    return line


def plot_box(page):
    """Return the offset of the lines of the chart on the page."""
    return page.locator("#chart svg").first.bounding_box()


def luminance(color):
    x = np.array(color) / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize(("name", "scheme"), [("f", "dark"), ("c", "light")])
def test_color_key_matches_token_colors(name, scheme, visit, rng):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    trace = make_trace(rng, 5)
    low, high = (0, 1) if name == "f" else (-2, 2)
    getattr(trace, name)[0, :, 0] = np.linspace(low, high, 5)
    page = visit(trace, "abcde", scheme=scheme)
    page.check(f"input[value={name}]")
    page.select_option("#unit", "0")
    colors = np.array([rgb(token(page, step)) for step in range(5)])
    negative, zero, positive = {
        "light": ([213, 94, 0], [255, 255, 255], [0, 114, 178]),
        "dark": ([240, 130, 50], [20, 23, 27], [86, 180, 233]),
    }[scheme]
    ends = [zero, positive] if name == "f" else [negative, zero, positive]
    share = np.linspace(0, len(ends) - 1, 5)
    expected = [np.interp(share, range(len(ends)), rgb) for rgb in np.transpose(ends)]
    np.testing.assert_allclose(colors, np.transpose(expected), atol=2)
    for step in range(5):  # the contrast that WCAG requires
        pair = [luminance(colors[step]), luminance(rgb(token(page, step), "color"))]
        assert (max(pair) + 0.05) / (min(pair) + 0.05) > 4.5

    png = page.locator("#texts .bar").screenshot()
    png = image.open(io.BytesIO(png)).convert("RGB")
    box = page.locator("#texts .bar").bounding_box()
    bar = np.asarray(png)[png.height // 2]
    at = np.arange(3, len(bar) - 3)  # without the border
    share = (at - 0.5 - box["x"] % 1) / (box["width"] - 2) * 4
    expected = np.transpose([np.interp(share, range(5), rgb) for rgb in colors.T])
    np.testing.assert_allclose(bar[at], expected, atol=4)
    key = page.inner_text("#texts .key")
    assert name in key
    assert "of unit 0 (" in key
    assert [number(x) for x in re.findall(r"−?\d\.\d{3}", key)] == [low, high]


def test_keyboard_navigation(visit, trace):
    page = visit(trace, TEXT)
    page.focus("input[value=c]")
    page.keyboard.press("ArrowUp")
    assert page.is_checked("input[value=c_tilde]")
    page.focus("#unit")
    page.keyboard.press("Home")
    first = page.input_value("#unit")
    page.keyboard.press("ArrowDown")
    unit = page.input_value("#unit")
    assert unit != first
    last = len(TEXT) - 1
    for view in ("text", "chart"):
        page.focus(f"input[value={view}]")
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        while view == "chart" and not page.evaluate("document.activeElement.role"):
            page.keyboard.press("Tab")  # past the buttons of the zoom
        page.keyboard.press("Home")
        keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"]
        for key, step in zip(keys, [1, 2, 1, last, last, 0], strict=True):
            page.keyboard.press(key)
            assert_shows(page, trace, step, int(unit))
            assert page.get_attribute("#chart", "aria-valuenow") == str(step)


def test_sorting_of_units(visit, rng):
    trace = make_trace(rng, len(TEXT))
    vowel = np.isin(list(TEXT), list("aeiouAEIOU"))
    trace.f[..., 3] = np.where(vowel, 0.9, 0.1)
    trace.f[..., 1] = np.where(np.char.isdigit(list(TEXT)), 0.4, 0.6)
    trace.f[..., 2] = 0.5
    page = visit(trace, TEXT)
    page.check("input[value=f]")

    def listed(order):
        page.select_option("#order", order)
        script = "(options) => options.map((o) => [Number(o.value), o.text])"
        units, texts = zip(
            *page.eval_on_selector_all("#unit option", script), strict=True
        )
        assert page.input_value("#unit") == str(units[0])
        return units, [text.split(maxsplit=1)[-1] for text in texts]

    units, labels = listed("strongest correlation")
    assert {*units[:2]} == {1, 3}
    assert {*labels[:2]} == {"+1.00 vowel", "−1.00 digit"}
    assert (units[-1], labels[-1]) == (2, "constant")
    units, labels = listed("vowel")
    r = [abs(number(label)) for label in labels[:-1]]
    assert (units[0], r) == (3, sorted(r, reverse=True))
    variances = trace.f.var(axis=(0, 1))
    units, labels = listed("variance")
    assert units == (*np.argsort(-variances),)
    assert number(labels[0]) == pytest.approx(variances.max(), abs=6e-4)
    assert listed("unit number")[0] == (*range(UNITS),)
    page.select_option("#order", "strongest correlation")
    for query, expected in [("digit", {1}), ("3", {3}), ("vow", {3}), ("none", set())]:
        page.fill("#query", query)
        script = "(options) => options.map((option) => option.value)"
        found = page.eval_on_selector_all("#second option", script)
        assert expected <= {int(unit) for unit in found[1:]}
        assert ("2" in found) == (not query)


def test_report_keeps_masked_and_infinite_values_apart(rng, path):
    trace = make_trace(rng, 3, samples=1, masked=[1])
    trace.f[0, 0, 2] = np.inf
    trace.i[0, :, 4] = np.nan
    trace.o[0, [0, 2], 0] = 0.3  # constant, and not a float32
    trace.to_html(path)
    data, values = read_report(path)
    assert data["tokens"] is None
    for name in ("i", "f", "o"):
        expected = getattr(trace, name)[0]
        expected[np.isinf(expected)] = np.nan
        np.testing.assert_allclose(values[name], expected, atol=1 / 508)
    assert data["variance"]["o"][0] == data["variance"]["i"][4] == 0


def test_correlations_of_report_are_those_of_the_trace(rng, path):
    trace = make_trace(rng, len(TEXT), masked=[3, 40])
    vowel = np.isin(list(TEXT), list("aeiouAEIOU"))
    inputs = rng.normal(size=(2, len(TEXT), 3))
    trace.to_html(path, TEXT)
    of_tokens = read_data(path)["correlations"]
    trace.to_html(path, inputs=inputs, feature_names=["a", "b", "c"])
    of_inputs = read_data(path)["correlations"]
    for name in ARRAYS:
        features = {"vowel": vowel, "b": inputs[..., 1].astype("float32")}
        expected = trace.correlate(features, name)
        found = of_tokens[name]["vowel"], of_inputs[name]["b"]
        np.testing.assert_allclose(found, [*expected.values()], atol=6e-4)


def test_active_units_are_those_in_the_outer_quarters(rng, path):
    trace = make_trace(rng, 37, samples=3, masked=[4])
    trace.to_html(path)
    steps = trace.c.reshape(-1, UNITS).astype("float64")
    low, high = np.nanquantile(steps, [0.25, 0.75], axis=0)
    for packed, expected in zip(
        read_data(path)["activity"], (steps > high, steps < low), strict=True
    ):
        bits = np.frombuffer(zlib.decompress(base64.b64decode(packed)), "uint8")
        active = np.unpackbits(bits, count=steps.size).reshape(UNITS, -1).T
        np.testing.assert_array_equal(active, expected)


def test_line_chart_of_time_series(visit, rng):
    trace = make_trace(rng, 8, masked=[2, 3, 5])
    page = visit(trace)
    assert page.is_checked("input[value=chart]")  # the default without tokens
    page.check("input[value=f]")
    page.select_option("#unit", "4")
    orders = page.eval_on_selector_all("#order option", "(o) => o.map((x) => x.value)")
    assert orders == ["variance", "unit number"]
    lines = points(page.get_attribute("#chart path.selected", "d"))
    assert list(map(len, lines)) == [2, 1, 2]  # interrupted where masked
    x, y = np.concatenate(lines).T
    steps = [0, 1, 4, 6, 7]
    assert np.corrcoef(x, steps)[0, 1] == pytest.approx(1, abs=1e-5)
    assert np.corrcoef(y, trace.f[0, steps, 4])[0, 1] == pytest.approx(-1, abs=1e-4)
    box = plot_box(page)
    page.mouse.move(box["x"] + x[3], box["y"] + 20)
    assert_shows(page, trace, 6, 4)
    page.mouse.move(box["x"] + (x[1] + x[2]) / 2, box["y"] + 20)
    assert [page.inner_text(f"#value-{name}") for name in ARRAYS] == ["–"] * 6
    page.check("input[value=text]")
    assert page.inner_text(".text").split() == [str(t) for t in range(8)]


def test_hostile_tokens_in_a_browser(visit, rng):
    page = visit(make_trace(rng, len(HOSTILE)), HOSTILE)
    marks = re.compile("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069\u200f]")
    assert "⟨U+202E⟩gpj.exe" in page.inner_text(".text")
    assert page.locator("img, .text script").count() == 0
    for step, text in enumerate(HOSTILE):
        token(page, step).hover()
        where, shown = page.inner_text("#where"), token(page, step).text_content()
        assert not marks.search(where + shown)
        if text.isascii() and text.isprintable():
            assert json.dumps(text) in where
            assert shown == (text or "∅")


def test_report_on_a_phone(visit, trace):
    inputs = np.cumsum(np.ones((2, len(TEXT), 3)), axis=1)
    page = visit(trace, TEXT, width=390, touch=True, inputs=inputs, scores=inputs)
    token(page, 10).tap()
    assert_shows(page, trace, 10, int(page.input_value("#unit")))
    box = page.locator("#values").bounding_box()  # stays visible
    assert 0 <= box["y"] <= 800 - box["height"]
    for view in ("chart", "text"):
        page.check(f"input[value={view}]")
        if view == "chart":
            page.tap("[data-zoom='2']")
            width = page.evaluate("document.getElementById('scroll').scrollWidth")
            assert width > 600  # scrolls, but not the page
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_pinned_step_stays_until_escape(visit, trace):
    page = visit(trace, TEXT)
    page.select_option("#unit", "2")
    token(page, 4).hover()
    assert_shows(page, trace, 4, 2)
    token(page, 9).click()
    assert "pinned" in page.inner_text("#where")
    for view in ("text", "chart"):
        page.check(f"input[value={view}]")
        page.locator("#texts, #scroll").locator("visible=true").first.hover()
        page.select_option("#unit", "1")
        assert_shows(page, trace, 9, 1)
    page.keyboard.press("Escape")
    assert "pinned" not in page.inner_text("#where")
    box = plot_box(page)
    page.mouse.move(box["x"] + 1, box["y"] + 20)
    assert_shows(page, trace, 0, 1)
    page.mouse.click(box["x"] + box["width"] - 1, box["y"] + 20)
    page.mouse.move(box["x"] + 1, box["y"] + 20)
    assert_shows(page, trace, len(TEXT) - 1, 1)


def test_two_units_and_another_sequence(visit, trace):
    page = visit(trace, [TEXT, TEXT[::-1]])
    page.select_option("#unit", "3")
    page.select_option("#second", "0")
    page.select_option("#sample", "1")
    token(page, 5).click()
    assert_shows(page, trace, 5, 3, sample=1)
    assert_shows(page, trace, 5, 0, sample=1, id="second")
    assert json.dumps(TEXT[::-1][5]) in page.inner_text("#where")
    left, right = (page.locator(".text").nth(k) for k in range(2))
    assert left.inner_text() == right.inner_text()
    a, b = left.bounding_box(), right.bounding_box()
    assert a["x"] + a["width"] <= b["x"]
    for text, unit in ((left, 3), (right, 0)):
        step = int(trace.c[1, :, unit].argmax())
        blue = rgb(text.locator("span[data-step]").nth(step))
        assert blue[2] > blue[0] + 60
    page.select_option("#second", "")
    assert page.inner_text("#second-c") == ""


def test_own_range_of_a_gate_that_hardly_changes(visit, rng):
    trace = make_trace(rng, 8)
    trace.f[0, :, 2] = np.linspace(0.88, 0.95, 8)
    page = visit(trace, "abcdefgh")
    page.check("input[value=f]")
    page.select_option("#unit", "2")
    contrast = []
    for own in (False, True):
        page.set_checked("#own", own)
        page.check("input[value=chart]")
        height = np.ptp(selected_line(page)[:, 1])
        page.check("input[value=text]")
        ends = rgb(token(page, 0)), rgb(token(page, 7))
        contrast.append([height, np.abs(ends[0] - ends[1]).sum()])
    assert (contrast[1] > 10 * np.array(contrast[0])).all()
    assert "0.880" in page.inner_text("#texts .key")
    assert "0.950" in page.inner_text("#texts .key")


def test_inputs_and_scores_above_the_gates(visit, rng):
    trace = make_trace(rng, 8)
    inputs = np.stack([rng.normal(size=(2, 8)), 1e3 * rng.random((2, 8))], -1)
    inputs[0, 3, 0] = np.nan
    scores = rng.normal(size=inputs.shape)
    scores[0, 5, 1] = -4  # the largest
    times = np.datetime64("2013-11-30T20:00") + np.arange(8) * np.timedelta64(3, "h")
    names = ["wind", "<b>"]
    report = {"inputs": inputs, "scores": scores, "times": times}
    page = visit(trace, feature_names=names, **report)
    lines = [points(d) for d in paths(page, "#chart svg path:last-child")[:2]]
    assert [list(map(len, parts)) for parts in lines] == [[3, 4], [8]]
    for k, parts in enumerate(lines):
        known = np.isfinite(inputs[0, :, k])
        x, y = np.concatenate(parts).T
        r = np.corrcoef(y, inputs[0, known, k])[0, 1]
        assert r == pytest.approx(-1, abs=1e-4)
    gates = page.locator("#chart path.selected").bounding_box()
    assert plot_box(page)["y"] + np.max(y) < gates["y"]

    box = plot_box(page)
    page.mouse.move(box["x"] + x[5], box["y"] + 20)
    assert "2013-12-01 11:00" in page.inner_text("#where")
    wind, other = (page.text_content(f"#input-{k}") for k in range(2))
    assert wind.startswith("wind ")
    assert number(wind) == pytest.approx(inputs[0, 5, 0], abs=0.006)
    assert other.startswith("<b> ")
    assert other.endswith("(−4.000)")
    assert "−4.000" in page.inner_text("#score-key")

    script = "(canvas) => [canvas.width, ...canvas.getContext('2d').getImageData(0, 0, "
    width, *image = page.evaluate(f"({script}canvas.width, 92).data])(heat)")
    image = np.reshape(image, (92, width, 4))[..., :3]
    left = box["x"] - page.locator("#heat").bounding_box()["x"]
    for step in range(8):
        for k in range(2):
            share = scores[0, step, k] / 4
            end = np.array([0, 114, 178] if share > 0 else [213, 94, 0])
            found = image[46 * k + 30, int(left + x[step])]
            np.testing.assert_allclose(found, 255 + (end - 255) * abs(share), atol=2)


def test_zoom_and_scroll_of_thousands_of_steps(visit, rng):
    trace = make_trace(rng, 5000, units=1, samples=1)
    trace.c[0, 1234] = 40  # one step among several per pixel
    page = visit(trace)
    line = selected_line(page)
    assert len(line) < 5000
    box = plot_box(page)
    peak = 1234.5 / 5000 * box["width"]
    assert line[line[:, 1].argmin(), 0] == pytest.approx(peak, abs=2)

    page.mouse.move(box["x"] + peak, box["y"] + 150)
    page.keyboard.down("Control")
    for _ in range(12):
        page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_timeout(100)
    line = selected_line(page)
    assert len(line) < 100
    assert np.diff(line[:, 0]) == pytest.approx(24, abs=0.2)
    at = line[line[:, 1].argmin(), 0]
    assert at == pytest.approx(peak, abs=30)  # stays below the pointer
    page.mouse.move(box["x"] + at, box["y"] + 150)
    assert_shows(page, trace, 1234, 0)

    page.get_by_text("All").click()
    page.wait_for_timeout(100)
    line = selected_line(page)
    assert [line[0, 0], line[-1, 0]] == pytest.approx([0, box["width"]], abs=2)


def rank_spans(trace, sample, start, length):
    """Rank the spans by the share of the selection's active units, in NumPy."""
    low, high = np.nanquantile(trace.c, [0.25, 0.75], axis=(0, 1))
    code = (trace.c > high) * 1 - (trace.c < low) * 1
    chosen = code[sample, start : start + length]
    active = (chosen == chosen[0]).all(axis=0) & (chosen[0] != 0)
    same = (code == chosen[0])[..., active].mean(axis=-1)
    spans = [
        (-shares[t : t + length].mean(), k, t)
        for k, shares in enumerate(same)
        for t in range(len(shares) - length + 1)
    ]
    ranked, taken = [], [(sample, start)]
    for share, k, t in sorted(spans):
        if all(k != other or abs(t - at) >= length for other, at in taken):
            taken.append((k, t))
            ranked.append(-100 * share)
    return ranked[:20]


def test_similar_spans(visit, rng):
    trace = make_trace(rng, len(TEXT), units=12, samples=3)
    # Few levels, which quantization keeps apart; and a span where all units are active.
    levels = rng.integers(-9, 10, size=(3, 17, 12))
    trace.c[:] = np.repeat(levels, 3, axis=1)[:, : len(TEXT)]
    trace.c[0, 12:15] = rng.choice([-10, 10], size=12)
    trace.c[2, 30:33] = trace.c[0, 12:15]
    page = visit(trace, TEXT)
    page.fill("#from", "12")
    page.fill("#to", "14")
    page.get_by_text("Find similar spans").click()
    texts = page.locator("#matches button").all_inner_texts()
    pattern = r"sequence (\d+), time steps (\d+) to (\d+): (\d+) %"
    found = [tuple(map(int, re.match(pattern, text).groups())) for text in texts]
    expected = rank_spans(trace, 0, 12, 3)
    assert [share for *_, share in found] == pytest.approx(expected, abs=1)
    assert found[0] == (2, 30, 32, 100)
    assert all(end - start == 2 for _, start, end, _ in found)
    shown = page.inner_text("#matches mark >> nth=0")
    assert shown == TEXT[30:33].replace("\n", "⏎")
    page.click("#matches button >> nth=0")
    # The page's policy forbids `wait_for_function`, which evaluates a string.
    from playwright.sync_api import expect

    expect(page.locator("#sample")).to_have_value("2")
    assert_shows(page, trace, 30, int(page.input_value("#unit")), sample=2)


def test_selecting_a_span_by_pointer_and_keys(visit, trace):
    page = visit(trace, TEXT)

    def span():
        return [page.input_value(f"#{name}") for name in ("from", "to")]

    token(page, 8).hover()
    page.mouse.down()
    token(page, 3).hover()
    page.mouse.up()
    assert span() == ["3", "8"]
    marked = page.eval_on_selector_all(
        ".text .in-span", "(spans) => spans.map((span) => Number(span.dataset.step))"
    )
    assert marked == [3, 4, 5, 6, 7, 8]
    token(page, 10).click()
    token(page, 12).click(modifiers=["Shift"])
    assert span() == ["10", "12"]
    page.keyboard.press("Shift+ArrowRight")
    assert span() == ["10", "13"]
    page.check("input[value=chart]")
    box = plot_box(page)
    for press, step in ((page.mouse.down, 20), (page.mouse.up, 25)):
        x = box["x"] + (step + 0.5) * box["width"] / len(TEXT)
        page.mouse.move(x, box["y"] + 30)
        press()
    assert span() == ["20", "25"]
    selected = page.locator("#chart rect").bounding_box()
    assert selected["width"] == pytest.approx(6 * box["width"] / len(TEXT), abs=1)


def test_notebook_shows_the_report(browser, trace):
    page = browser.new_page()
    page.set_content(trace._repr_html_())
    frame = page.frame_locator("iframe")
    frame.locator("html[data-ready]").wait_for(timeout=20_000)
    assert "2 sequences" in frame.locator("#note").inner_text()
    page.close()
