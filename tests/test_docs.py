"""Every Python block of the documentation runs and prints the output shown below it."""

import contextlib
import doctest
import io
import json
import re
import tomllib
import warnings
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from keras2_files import write_keras_2_1

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")]
LANGUAGES = {"python", "shell", "text", "bibtex", "cpp"}
# What a block needs, by what it contains.
PACKAGES = {
    "plotting": "matplotlib",
    "to_dataframe": "pandas",
    "from d2l": "d2l",
    "onnxruntime": "onnxruntime",
    "ai_edge_litert": "ai_edge_litert",
    "tflite_micro": "tflite_micro",
    "coremltools": "coremltools",
}
BACKENDS = {
    "import tensorflow": "tensorflow",
    ".tflite": "tensorflow",
    "LayoutMap": "jax",
    "import jax\n": "jax",
    'format="onnx"': "torch",
    "coremltools": "torch",
    "import torch\n": "torch",
}
SLOW = {"experiments", "forecasting", "from-d2l", "inspecting-gates", "questions"}
BOOK = ROOT.parent / "shared" / "data" / "timemachine.txt"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"\s*```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """The Python blocks of a page."""
    return [code for code, _ in blocks_with_outputs(page)]


def blocks_with_outputs(page):
    """Pairs of a Python block and the output below it, or None."""
    text = page.read_text()
    for fence in FENCE.finditer(text):
        if fence[1] == "python":
            output = OUTPUT.match(text, fence.end())
            yield fence[2], output and output[1]


def is_for_backend(page):
    """On TensorFlow every page; elsewhere the README, and those with a block for it."""
    backend = keras.backend.backend()
    signs = [sign for sign, name in BACKENDS.items() if name == backend]
    if backend == "tensorflow" or page == READMES[0]:
        return True
    return any(sign in code for sign in signs for code in blocks(page))


def can_run(code):
    return all(
        find_spec(name) for sign, name in PACKAGES.items() if sign in code
    ) and all(
        keras.backend.backend() == name
        for sign, name in BACKENDS.items()
        if sign in code
    )


def marks_of(page):
    slow = [pytest.mark.slow] * (page.stem in SLOW)
    return slow + [pytest.mark.ci] * (page not in READMES)


@pytest.mark.one_backend
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fences_name_a_known_language(page):
    """A block in another spelling of `python` would not run."""
    opened = re.findall(r"^ *(?:```+|~~~+) *([^\n`]*)$", page.read_text(), re.M)[::2]
    assert opened == [language for language, _ in FENCE.findall(page.read_text())]
    assert set(opened) <= LANGUAGES


# `d2l==0.17.0` draws with a deprecated function of IPython.
@pytest.mark.filterwarnings("ignore:`set_matplotlib_formats`:DeprecationWarning")
# Keras exports to ONNX on torch with the older exporter.
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based")
@pytest.mark.filterwarnings("ignore:.*might cause the trace to be incorrect")
@pytest.mark.filterwarnings("ignore:torch.* results are registered as constants")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.stem, marks=marks_of(p))
        for p in PAGES
        if blocks(p) and p != READMES[1]
    ],
)
def test_blocks_run(page, tmp_path, monkeypatch):
    if not is_for_backend(page):
        pytest.skip("the same on tensorflow")
    if any("from d2l" in code and can_run(code) for code in blocks(page)):
        from d2l import tensorflow as d2l

        # A local file in place of the download.
        text = BOOK if BOOK.exists() else ROOT / "examples" / "time_traveller.txt"
        monkeypatch.setattr(d2l, "download", lambda name: str(text))
    monkeypatch.chdir(tmp_path)
    names, count = {"__name__": "__main__"}, 0
    if any("load_keras2" in code for code in blocks(page)):  # the reader's file
        write_keras_2_1(tmp_path / "stock_2018.h5", np.random.default_rng(0))
        names["prices"] = np.ones((1, 5, 3))
    if any('"my_model.keras"' in code for code in blocks(page)):  # likewise
        layers = [keras.Input((None, 3)), keras.layers.LSTM(4, name="lstm")]
        keras.Sequential(layers).save(tmp_path / "my_model.keras")
        names |= {"inputs": np.ones((1, 5, 3)), "my_text": "Hello"}
    for code, expected in blocks_with_outputs(page):
        if not can_run(code):
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            if "coremltools" in code:  # whose converter warns of its own code
                warnings.simplefilter("ignore")
            exec(compile(code, page.name, "exec"), names)
        if expected is not None:
            assert doctest.OutputChecker().check_output(
                expected, printed.getvalue(), doctest.ELLIPSIS
            ), f"expected:\n{expected}\nprinted:\n{printed.getvalue()}"
    if not count:
        pytest.skip("needs another backend or package")


@pytest.mark.one_backend
def test_both_readmes_have_the_same_code():
    one, other = (
        [(re.sub(" *#.*", "", code), text) for code, text in blocks_with_outputs(page)]
        for page in READMES
    )
    assert one == other


@pytest.mark.one_backend
@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_readme_links_are_absolute_and_exist(page):
    """PyPI resolves no relative links."""
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert all(link.startswith("https://") for link in links)
    site = "https://keras-scratch-lstm.github.io/keras-scratch-lstm/"
    ours = [re.search(r"/keras-scratch-lstm(?:/blob)?/main/([^#]+)", x) for x in links]
    paths = [match[1] for match in ours if match]
    for link in (link.partition("#")[0] for link in links):
        if link.startswith(site):
            page = f"docs/{link.removeprefix(site)}".rstrip("/")
            is_folder = (ROOT / page).is_dir()
            paths.append(f"{page}/index.md" if is_folder else f"{page}.md")
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.one_backend
@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: page.name)
def test_named_and_linked_files_exist(page):
    text = page.read_text()
    folders = "src|tests|examples|benchmarks|docs"
    named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\w", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.one_backend
@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_readme_commands(page):
    """One line sets up and runs the main job, and one the tests."""
    main_job = 'pip install -e ".[examples]" && python examples/time_machine.py --quick'
    lines = [block.strip() for _, block in FENCE.findall(page.read_text())]
    assert main_job in lines
    assert 'pip install -e ".[test]" && pytest' in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"examples", "test"} <= set(project["optional-dependencies"])
    assert (ROOT / "examples" / "time_machine.py").exists()


@pytest.mark.one_backend
def test_readme_is_short():
    assert len(READMES[0].read_text().splitlines()) <= 155
    words = sum(len(page.read_text().split()) for page in PAGES if page not in READMES)
    assert words <= 13_400


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "page", [*READMES, ROOT / "docs" / "benchmarks.md"], ids=lambda page: page.name
)
def test_benchmark_summary_covers_the_results(page):
    """Each ratio on the three hosts lies in the range of the table."""
    (table,) = re.findall(
        r"<!-- measured: summary -->\n(.*?)<!-- /measured -->", page.read_text(), re.S
    )
    rows = [re.findall(r"(\d\.\d\d)–(\d\.\d\d)", row) for row in table.splitlines()[2:]]
    for name in ("main", "main-slow", "quick"):
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        results = json.loads(file.read_text())
        for ranges, backend in zip(rows, ("tensorflow", "jax", "torch"), strict=True):
            ratios = list(results[backend]["ratios"].values())[:3]
            for (low, high), ratio in zip(ranges, ratios, strict=True):
                assert float(low) - 0.005 <= ratio <= float(high) + 0.005


@pytest.mark.one_backend
def test_runtimes_are_those_of_the_script():
    page = (ROOT / "docs" / "deployment.md").read_text()
    table = (ROOT / "benchmarks" / "results" / "runtimes.md").read_text()
    assert page.split("<!-- runtimes -->")[1].strip() == table.strip()
