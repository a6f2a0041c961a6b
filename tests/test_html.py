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

pytestmark = pytest.mark.one_backend

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


def read_report(path):
    """Decode the data of a report independently of its script."""
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    data = json.loads(re.search(pattern, path.read_text("utf-8"), re.DOTALL)[1])
    names, shape = data["stored"], (len(data["stored"]), data["units"], data["time"])
    codes = np.frombuffer(zlib.decompress(base64.b64decode(data["values"])), "uint8")
    low, high = (
        np.frombuffer(base64.b64decode(data[key]), "<f4").reshape(*shape[:2], 1)
        for key in ("low", "high")
    )
    codes = codes.reshape(shape)
    values = low + (high - low) * (codes / data["levels"])
    values[codes == 255] = np.nan
    values = dict(zip(names, values.swapaxes(1, 2), strict=True))
    return data, {"h": values["o"] * np.tanh(values["c"])} | values


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
    tokens = ["".join(rng.choice(list("abc d\n"), time)) for _ in range(2)]
    changes = {} if is_lstm else {"h": rng.uniform(-3, 3, (2, time, units))}
    trace = make_trace(rng, time, units, **changes)
    trace.to_html(path, tokens, sample=1)
    assert path.stat().st_size < 3_000_000
    data, values = read_report(path)
    assert data["tokens"] == list(tokens[1])
    assert data["levels"] >= levels
    assert data["stored"] == list(ARRAYS[: 5 if is_lstm else 6])
    assert_close(values, trace, 1, data)
    for name in ARRAYS:
        variance = getattr(trace, name)[1].var(axis=0, dtype="float64")
        np.testing.assert_allclose(data["variance"][name], variance, atol=1e-5)


def test_report_keeps_masked_and_infinite_values_apart(rng, path):
    trace = make_trace(rng, 3, masked=[1])
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
    trace = make_trace(rng, len(TEXT), samples=1, masked=[3, 40])
    trace.to_html(path, TEXT)
    data, _ = read_report(path)
    vowel = np.isin(list(TEXT), list("aeiouAEIOU"))
    for name in ARRAYS:
        (expected,) = trace.correlate({"vowel": vowel}, name).values()
        found = data["correlations"][name]["vowel"]
        np.testing.assert_allclose(found, expected, atol=6e-4)


def test_hostile_names_and_tokens_are_escaped(rng, path):
    layer = "".join(HOSTILE)
    make_trace(rng, len(HOSTILE), layer=layer).to_html(path, HOSTILE)
    page = path.read_text("utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert "<img" not in page
    assert not re.search("[\x00\x1b\u2028\u2029\u202a-\u202e\u2066-\u2069]", page)
    assert read_report(path)[0]["tokens"] == HOSTILE
    title = html.unescape(re.search("<title>Gates of (.*?)</title>", page)[1])
    assert title == "".join(c if c.isprintable() else "�" for c in layer)


@pytest.mark.parametrize("arguments", [{"tokens": "ab"}, {"sample": 2}])
def test_invalid_arguments_write_nothing(arguments, trace, path):
    with pytest.raises(ValueError, match=f"^`{next(iter(arguments))}` must "):
        trace.to_html(path, **arguments)
    assert not path.exists()


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

    def visit(trace, tokens=None, width=1200, scheme="light", **kwargs):
        trace.to_html(path, tokens)
        kwargs |= {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
        contexts.append(browser.new_context(**kwargs))
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
    return page.locator(f"#text span[data-step='{step}']")


def number(text):
    return float(re.search(r"[+−]?\d+(\.\d+)?", text)[0].replace("−", "-"))


def assert_shows(page, trace, step, unit):
    for name in ARRAYS:
        shown = page.inner_text(f"#value-{name}")
        digits = len(shown.partition(".")[2])
        assert digits >= 1
        tolerance = np.nanmax(np.abs(trace.c)) / 127 + 0.5 * 10**-digits
        assert abs(number(shown) - getattr(trace, name)[0, step, unit]) <= tolerance
    assert page.inner_text("#where").startswith(f"time step {step}")
    assert page.inner_text("#where").endswith(f", unit {unit}")


def luminance(color):
    x = np.array(color) / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["f", "c"])
def test_color_key_matches_token_colors(name, scheme, visit, rng):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    trace = make_trace(rng, 5)
    low, high = (0, 1) if name == "f" else (-2, 2)
    getattr(trace, name)[0, :, 0] = np.linspace(low, high, 5)
    page = visit(trace, "abcde", scheme=scheme)
    page.check(f"input[value={name}]")
    page.select_option("#unit", "0")

    def color(step, attribute):
        style = f"(span) => getComputedStyle(span).{attribute}"
        return np.array(re.findall(r"\d+", token(page, step).evaluate(style)), int)[:3]

    colors = np.array([color(step, "backgroundColor") for step in range(5)])
    negative, zero, positive = {
        "light": ([213, 94, 0], [255, 255, 255], [0, 114, 178]),
        "dark": ([240, 130, 50], [20, 23, 27], [86, 180, 233]),
    }[scheme]
    ends = [zero, positive] if name == "f" else [negative, zero, positive]
    share = np.linspace(0, len(ends) - 1, 5)
    expected = [np.interp(share, range(len(ends)), rgb) for rgb in np.transpose(ends)]
    np.testing.assert_allclose(colors, np.transpose(expected), atol=2)
    for step in range(5):  # the contrast that WCAG requires
        pair = [luminance(colors[step]), luminance(color(step, "color"))]
        assert (max(pair) + 0.05) / (min(pair) + 0.05) > 4.5

    png = image.open(io.BytesIO(page.locator("#bar").screenshot())).convert("RGB")
    bar = np.asarray(png)[png.height // 2]
    at = np.arange(3, len(bar) - 3)  # without the border
    share = (at - 0.5) / (len(bar) - 2) * 4
    expected = np.transpose([np.interp(share, range(5), rgb) for rgb in colors.T])
    np.testing.assert_allclose(bar[at], expected, atol=4)
    assert number(page.inner_text("#low")) == low
    assert number(page.inner_text("#high")) == high


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
        page.keyboard.press("Home")
        keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"]
        for key, step in zip(keys, [1, 2, 1, last, last, 0], strict=True):
            page.keyboard.press(key)
            assert_shows(page, trace, step, int(unit))
            assert page.get_attribute("#chart", "aria-valuenow") == str(step)


def test_sorting_of_units(visit, rng):
    trace = make_trace(rng, len(TEXT))
    vowel = np.isin(list(TEXT), list("aeiouAEIOU"))
    trace.f[0, :, 3] = np.where(vowel, 0.9, 0.1)
    trace.f[0, :, 1] = np.where(np.char.isdigit(list(TEXT)), 0.4, 0.6)
    trace.f[0, :, 2] = 0.5
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
    variances = trace.f[0].var(axis=0)
    units, labels = listed("variance")
    assert units == (*np.argsort(-variances),)
    assert labels[0] == f"variance {variances.max():.3f}"
    assert listed("unit number")[0] == (*range(UNITS),)


@pytest.mark.parametrize("tokens", [None, np.arange(8) / 8], ids=["none", "numbers"])
def test_line_chart_of_time_series(tokens, visit, rng):
    trace = make_trace(rng, 8, masked=[2, 3, 5])
    page = visit(trace, tokens)
    page.check("input[value=chart]")  # the default without tokens
    page.check("input[value=f]")
    page.select_option("#unit", "4")
    orders = page.eval_on_selector_all("#order option", "(o) => o.map((x) => x.value)")
    assert orders == ["variance", "unit number"]
    path = page.get_attribute("#chart path.selected", "d")
    lines = [re.findall(r"([\d.]+),([\d.]+)", part) for part in path.split("M")[1:]]
    assert list(map(len, lines)) == [2, 1, 2]  # interrupted where masked
    x, y = np.concatenate([np.array(line, float) for line in lines]).T
    steps = [0, 1, 4, 6, 7]
    assert np.corrcoef(x, steps)[0, 1] == pytest.approx(1, abs=1e-5)
    assert np.corrcoef(y, trace.f[0, steps, 4])[0, 1] == pytest.approx(-1, abs=1e-4)
    box = page.locator("#chart").bounding_box()
    page.mouse.move(box["x"] + x[3], box["y"] + 20)
    assert_shows(page, trace, 6, 4)
    page.mouse.move(box["x"] + (x[1] + x[2]) / 2, box["y"] + 20)
    assert [page.inner_text(f"#value-{name}") for name in ARRAYS] == ["–"] * 6
    page.check("input[value=text]")
    shown = page.inner_text("#text").split()
    assert shown == [str(t) for t in (range(8) if tokens is None else tokens)]


def test_hostile_tokens_in_a_browser(visit, rng):
    page = visit(make_trace(rng, len(HOSTILE)), HOSTILE)
    marks = re.compile("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069\u200f]")
    assert not marks.search(page.inner_text("#text"))
    assert "⟨U+202E⟩gpj.exe" in page.inner_text("#text")
    assert page.locator("#text span").count() == len(HOSTILE)
    assert page.locator("img, #text script").count() == 0
    for step, text in enumerate(HOSTILE):
        token(page, step).hover()
        where = page.inner_text("#where")
        assert not marks.search(where)
        if text.isascii() and text.isprintable():
            assert json.dumps(text) in where
            assert token(page, step).text_content() == (text or "∅")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_on_a_phone(visit, trace, scheme):
    page = visit(trace, TEXT, width=390, scheme=scheme, has_touch=True)
    token(page, 10).tap()
    assert_shows(page, trace, 10, int(page.input_value("#unit")))
    box = page.locator("#values").bounding_box()  # stays visible
    assert 0 <= box["y"] <= 800 - box["height"]
    for view in ("chart", "text"):
        page.check(f"input[value={view}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
