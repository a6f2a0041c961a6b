import base64
import html
import json
import re
import shutil
import sys
import zlib

import numpy as np
import pytest

from keras_scratch_lstm import GateTrace
from keras_scratch_lstm.tracing.trace import ARRAYS

pytestmark = pytest.mark.one_backend

TEXT = 'The "Time" of 1895, (a\nsea) of it. I see: 7 Owls\n!'
UNITS = 5


def make_trace(rng, tokens, units=UNITS, samples=2, **changes):
    """A trace of random gates, that follows the last two equations."""
    shape = samples, len(tokens), units
    i, f, o = rng.random((3, *shape))
    c_tilde, c = rng.uniform(-1, 1, shape), rng.normal(size=shape)
    arrays = {"i": i, "f": f, "o": o, "c_tilde": c_tilde, "c": c}
    arrays = arrays | {"h": o * np.tanh(c)} | changes
    arrays = {name: array.astype("float32") for name, array in arrays.items()}
    return GateTrace(**arrays, layer="lstm")


@pytest.fixture
def trace(rng):
    return make_trace(rng, TEXT)


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("jinja2", reason="Jinja2 is not installed")
    return tmp_path / "page.html"


def data_of(path):
    """What the page carries, and its numbers decoded: the reader's way in Python."""
    text = re.search(
        r'<script type="application/json" id="data">(.*?)</script>',
        path.read_text("utf-8"),
        re.DOTALL,
    )[1]
    data = json.loads(text)
    names, units = data["stored"], data["units"]
    steps = np.frombuffer(zlib.decompress(base64.b64decode(data["numbers"])), "uint8")
    low, high = (
        np.frombuffer(base64.b64decode(data[key]), "<f4").reshape(-1, units, 1)
        for key in ("low", "high")
    )
    steps = steps.reshape(len(names), units, -1)
    numbers = low + (high - low) * (steps / data["levels"])
    numbers[steps == 255] = np.nan
    return data, dict(zip(names, numbers.swapaxes(1, 2), strict=True))


def bounds(trace, sample, levels):
    """How far a number may be off, for each array `(units,)`."""
    half = {
        name: np.ptp(getattr(trace, name)[sample], axis=0) / levels / 2 + 1e-6
        for name in ARRAYS
    }
    return half, half | {"h": half["o"] + half["c"]}


def assert_near(numbers, trace, sample, levels, derived):
    half, with_h = bounds(trace, sample, levels)
    for name in ARRAYS:
        off = np.abs(numbers[name] - getattr(trace, name)[sample])
        assert (off <= (with_h if derived else half)[name]).all(), name


# --- the file ----------------------------------------------------------------


def test_the_numbers_are_off_by_half_a_step_at_most(trace, path):
    trace.to_html(path, TEXT, sample=1)
    data, numbers = data_of(path)
    assert data["tokens"] == list(TEXT)
    assert data["levels"] == 254
    assert data["stored"] == [name for name in ARRAYS if name != "h"]
    numbers["h"] = numbers["o"] * np.tanh(numbers["c"])
    assert_near(numbers, trace, 1, 254, derived=True)


def test_h_is_stored_where_it_is_not_o_tanh_c(rng, path):
    trace = make_trace(rng, TEXT, h=rng.uniform(-3, 3, (2, len(TEXT), UNITS)))
    trace.to_html(path, TEXT)
    data, numbers = data_of(path)
    assert data["stored"] == list(ARRAYS)
    assert_near(numbers, trace, 0, 254, derived=False)


@pytest.mark.parametrize("kind", ["of an LSTM", "of no LSTM"])
def test_pure_noise_is_under_3_mb(kind, rng, path):
    tokens = "".join(rng.choice(list("abc d\n"), 2000))
    changes = {}
    if kind == "of no LSTM":
        changes = {"h": rng.uniform(-1, 1, (1, 2000, 256))}
    trace = make_trace(rng, tokens, units=256, samples=1, **changes)
    trace.to_html(path, tokens)
    assert 1_500_000 < path.stat().st_size < 3_000_000
    data, numbers = data_of(path)
    assert data["levels"] >= 31
    numbers.setdefault("h", numbers["o"] * np.tanh(numbers["c"]))
    assert_near(numbers, trace, 0, data["levels"], derived="h" not in data["stored"])


def test_steps_without_a_number_stay_so(rng, path):
    trace = make_trace(rng, "abc")
    for name in ARRAYS:
        getattr(trace, name)[0, 1] = np.nan
    trace.f[0, 0, 2], trace.f[0, 2, 3] = np.inf, np.nan
    trace.i[0, :, 4] = np.nan
    trace.o[0, [0, 2], 0] = 0.25  # all the same
    trace.to_html(path, "abc")
    _, numbers = data_of(path)
    for name in ("i", "f", "o"):
        expected = getattr(trace, name)[0]
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(numbers[name]), finite)
        np.testing.assert_allclose(
            numbers[name][finite], expected[finite], atol=np.ptp(expected[finite]) / 508
        )
    assert (numbers["o"][[0, 2], 0] == 0.25).all()


def test_hostile_text_stays_text(rng, path):
    tokens = ["</script><script>alert(1)</script>", "<!--", "'", '"', "&lt;", "\ud800"]
    trace = make_trace(rng, tokens)
    arrays = {name: getattr(trace, name) for name in ARRAYS}
    evil = GateTrace(**arrays, layer='"><img src=x onerror=alert(1)>')
    evil.to_html(path, tokens)
    page = path.read_text("utf-8")
    assert "alert(1)<" not in page
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert data_of(path)[0]["tokens"] == tokens


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "\u2028\u2029",
    "\x00",
    "\x1b[31m",
    "\u202egpj.exe",
    "\u2066\u200f",
    "\ud800",
    "\"'`",
    "{{ data }}{% raw %}",
    "\\u003c/script\\u003e",
    "&lt;img src=x onerror=alert(1)&gt;",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_layer_name_stays_text(name, rng, path):
    trace = make_trace(rng, HOSTILE)
    arrays = {array: getattr(trace, array) for array in ARRAYS}
    GateTrace(**arrays, layer=name).to_html(path, HOSTILE)
    page = path.read_text("utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert not re.search("[\x00\x1b\u2028\u2029\u202a-\u202e\u2066-\u2069]", page)
    data, _ = data_of(path)
    assert (data["tokens"], data["layer"]) == (HOSTILE, name)
    title = html.unescape(re.search("<title>Gates of (.*?)</title>", page)[1])
    shown = "".join(one if one.isprintable() else "�" for one in name)
    assert title == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ab"], "`tokens` has 2 tokens; expected 50, one for each step"),
        ([3], "`tokens` is 3; expected a string or a list of 50 strings"),
        ([TEXT, 2], "`sample` is 2; expected an integer from 0 to 1"),
        ([TEXT, -1], "`sample` is -1; expected"),
        ([TEXT, "0"], "`sample` is '0'; expected"),
        ([TEXT, True], "`sample` is True; expected"),
    ],
    ids=str,
)
def test_what_does_not_fit_writes_nothing(arguments, message, trace, path):
    with pytest.raises(ValueError, match=message):
        trace.to_html(path, *arguments)
    assert not path.exists()


def test_without_jinja_it_is_said(trace, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ImportError, match=r'`pip install "keras-scratch-lstm\[plot\]"`'
    ):
        trace.to_html(path, TEXT)


# --- in a browser ------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    found = [shutil.which(name) for name in names if shutil.which(name)]
    if not found:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found[0],
            args=["--no-sandbox"],  # which a container may not allow
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, path):
    """Opens a trace's page; nothing may go wrong in it, nor come from the net."""
    contexts, wrong = [], []

    def visit(trace, tokens, sample=0, width=1200, scheme="light", **kwargs):
        trace.to_html(path, tokens, sample)
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **kwargs
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on(
            "request",
            lambda request: request.url == path.as_uri() or wrong.append(request.url),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def token(page, step):
    return page.locator(f"#text span[data-step='{step}']")


def shown(page):
    """The six numbers that the page shows."""
    return {
        name: float(page.inner_text(f"#value-{name}").replace("−", "-"))
        for name in ARRAYS
    }


def assert_shows(page, trace, step, unit, sample=0):
    levels = 254
    _, with_h = bounds(trace, sample, levels)
    for name, value in shown(page).items():
        digits = len(page.inner_text(f"#value-{name}").partition(".")[2])
        assert digits >= 1
        # Rounded to a step, and then to so many digits.
        slack = with_h[name][unit] + 0.5 * 10**-digits + 1e-9
        assert abs(value - getattr(trace, name)[sample, step, unit]) <= slack, name
    assert page.inner_text("#where").startswith(f"step {step}, ")
    assert page.inner_text("#where").endswith(f", unit {unit}")


def test_the_page_has_the_arrays(visit, trace):
    page = visit(trace, TEXT, sample=1)
    read = page.evaluate(
        """() => Object.fromEntries(Object.keys(NAMES).map((name) => [name,
            Array.from({length: data.units}, (_, u) => [...valuesOf(name, u)])]))"""
    )
    numbers = {name: np.array(values).T for name, values in read.items()}
    assert_near(numbers, trace, 1, 254, derived=True)
    np.testing.assert_equal(page.title(), "Gates of lstm")


def test_pick_and_hover(visit, trace):
    page = visit(trace, TEXT)
    text = page.inner_text("#text")
    assert text.replace("⏎", "").split() == TEXT.split()
    for name, unit, step in [("f", 3, 7), ("h", 0, 20), ("c_tilde", 4, 49)]:
        page.check(f"input[value={name}]")
        page.select_option("#unit", str(unit))
        token(page, step).hover()
        assert token(page, step).get_attribute("aria-current") == "true"
        assert page.locator("#text [aria-current]").count() == 1
        assert_shows(page, trace, step, unit)


def test_hostile_text_in_a_browser(visit, rng):
    tokens = HOSTILE
    page = visit(make_trace(rng, tokens), tokens)
    marks = re.compile("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069\u200f]")
    assert not marks.search(page.inner_text("#text"))
    assert "⟨U+202E⟩gpj.exe" in page.inner_text("#text")
    for step, text in enumerate(tokens):
        token(page, step).hover()
        where = page.inner_text("#where")
        assert not marks.search(where)
        assert where.startswith(f"step {step}, ")
        if text.isascii() and text.isprintable():
            assert json.dumps(text) in where
    assert page.locator("#text span").count() == len(tokens)
    assert page.locator("img, #text script").count() == 0


def background(page, step):
    style = token(page, step).evaluate(
        "(span) => getComputedStyle(span).backgroundColor"
    )
    return np.array([int(part) for part in re.findall(r"\d+", style)[:3]])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_values(visit, rng, scheme):
    trace = make_trace(rng, "abcde")
    trace.f[0, :, 0] = [0, 0.25, 0.5, 0.75, 1]
    trace.c[0, :, 0] = [-2, -1, 0, 1, 2]
    page = visit(trace, "abcde", scheme=scheme)
    page.check("input[value=f]")
    page.select_option("#unit", "0")
    colours = np.array([background(page, step) for step in range(5)], float)
    nothing = [255] * 3 if scheme == "light" else [20, 23, 27]
    full = [0, 114, 178] if scheme == "light" else [86, 180, 233]
    share = np.linspace(0, 1, 5)[:, None]
    expected = nothing + share * (np.array(full) - nothing)
    np.testing.assert_allclose(colours, expected, atol=2)
    assert (page.inner_text("#low"), page.inner_text("#high")) == ("0", "1")

    page.check("input[value=c]")
    page.select_option("#unit", "0")
    assert (page.inner_text("#low"), page.inner_text("#high")) == ("−2.00", "+2.00")
    low, high = background(page, 0), background(page, 4)
    assert low[0] > low[2]  # orange
    assert high[0] < high[2]  # blue
    np.testing.assert_allclose(background(page, 2), nothing, atol=3)
    # The letters stand out from what they stand on.
    for step in range(5):
        contrast = token(page, step).evaluate(
            """(span) => {
              const [a, b] = ["color", "backgroundColor"].map((key) => 0.05 + luminance(
                getComputedStyle(span)[key].match(/\\d+/g).slice(0, 3).map(Number)));
              return Math.max(a, b) / Math.min(a, b);
            }"""
        )
        assert contrast > 4.5


def test_the_keyboard_does_everything(visit, trace):
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
    page.keyboard.press("Tab")
    step = "Number(document.activeElement.dataset.step)"
    assert page.evaluate(step) == 0
    for key, expected in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)]:
        page.keyboard.press(key)
        assert page.evaluate(step) == expected
        assert_shows(page, trace, expected, int(unit))
    page.keyboard.press("ArrowDown")  # one below, in the second line
    newline = TEXT.index("\n")
    assert page.evaluate(step) == newline + 2
    page.keyboard.press("ArrowUp")
    assert page.evaluate(step) == 1
    page.keyboard.press("ArrowUp")  # there is nothing above
    assert page.evaluate(step) == 1
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(step) == len(TEXT) - 1
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(step) == 0


def units_listed(page):
    return page.eval_on_selector_all(
        "#unit option", "(options) => options.map((o) => [Number(o.value), o.text])"
    )


def test_units_are_found_by_what_they_follow(visit, rng):
    trace = make_trace(rng, TEXT)
    is_vowel = np.array([letter in "aeiouyAEIOUY" for letter in TEXT])
    is_digit = np.array([letter.isdigit() for letter in TEXT])
    trace.f[0, :, 3] = np.where(is_vowel, 0.9, 0.1)
    trace.f[0, :, 1] = np.where(is_digit, 0.4, 0.6)
    trace.f[0, :, 2] = 0.5
    page = visit(trace, TEXT)
    page.check("input[value=f]")
    listed = units_listed(page)
    assert {unit for unit, _ in listed[:2]} == {1, 3}
    assert {text.split(maxsplit=1)[1] for _, text in listed[:2]} == {
        "+1.00 vowel",
        "−1.00 digit",
    }
    assert listed[-1][0] == 2
    assert listed[-1][1].endswith("constant")

    page.select_option("#order", "vowel")
    assert units_listed(page)[0] == [3, "3 +1.00 vowel"]
    # As NumPy has it.
    for unit, text in units_listed(page)[1:-1]:
        r = np.corrcoef(trace.f[0, :, unit], is_vowel)[0, 1]
        shown = float(re.search(r"[+−]\d\.\d\d", text)[0].replace("−", "-"))
        assert abs(r - shown) < 0.011
    assert page.input_value("#unit") == "3"

    page.select_option("#order", "place in the word")
    place, places = 0, []
    for letter in TEXT:
        place = 0 if letter.isspace() else place + 1
        places.append(place)
    r = np.corrcoef(trace.f[0, :, 0], places)[0, 1]
    text = dict(units_listed(page))[0].replace("−", "-")
    assert abs(r - float(text.split()[1])) < 0.011

    page.select_option("#order", "variance")
    variances = trace.f[0].var(axis=0)
    listed = units_listed(page)
    assert [unit for unit, _ in listed] == np.argsort(-variances).tolist()
    assert listed[0][1].endswith(f"variance {variances.max():.3f}")

    classes = page.eval_on_selector_all("#order option", "(o) => o.map((x) => x.value)")
    assert classes == [
        "what it follows most",
        "variance",
        "space",
        "start of a word",
        "vowel",
        "consonant",
        "capital",
        "digit",
        "punctuation",
        "newline",
        "within quotes",
        "within brackets",
        "place in the word",
        "place in the line",
    ]


def test_classes_that_no_token_is_of_are_left_out(visit, rng):
    page = visit(make_trace(rng, "aaaa"), "aaaa")
    classes = page.eval_on_selector_all("#order option", "(o) => o.map((x) => x.value)")
    assert classes == ["what it follows most", "variance", "start of a word"]


def test_masked_steps_have_no_number(visit, rng):
    trace = make_trace(rng, "ab d")
    for name in ARRAYS:
        getattr(trace, name)[0, 1] = np.nan
    page = visit(trace, "ab d")
    token(page, 1).hover()
    assert [page.inner_text(f"#value-{name}") for name in ARRAYS] == ["–"] * 6
    page.check("input[value=f]")
    page.select_option("#order", "space")
    kept = [0, 2, 3]
    for unit, text in units_listed(page):
        r = np.corrcoef(trace.f[0, kept, unit], [0, 1, 0])[0, 1]
        shown = float(re.search(r"[+−]\d\.\d\d", text)[0].replace("−", "-"))
        assert abs(r - shown) < 0.02


def test_hostile_text_is_shown_as_it_is(visit, rng):
    tokens = [
        "</script><script>alert(1)</script>",
        '<img src="x" onerror="alert(2)">',
        "'\"&amp;",
        "<!--<script>",
        "{{ 7 * 7 }}",
        "",
    ]
    page = visit(make_trace(rng, tokens), tokens)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    for step, expected in enumerate(tokens):
        assert token(page, step).text_content() == (expected or "∅")
        token(page, step).hover()
        assert json.dumps(expected, ensure_ascii=False) in page.inner_text("#where")


def test_words_are_kept_apart(visit, rng):
    tokens = ["the", "time", "machine", "by", "h", "."]
    page = visit(make_trace(rng, tokens), tokens)
    assert page.inner_text("#text").split() == tokens


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(visit, trace, scheme):
    page = visit(trace, TEXT, width=390, scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    token(page, 10).tap()
    unit = int(page.input_value("#unit"))
    assert_shows(page, trace, 10, unit)
    # The numbers stay in sight.
    box = page.locator("#numbers").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 800
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
