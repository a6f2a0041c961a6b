"""Every block of Python in the READMEs and in docs/ runs, in the order of its page."""

import re
from importlib.util import find_spec
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh-CN.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NEEDS = {
    "matplotlib": r"plotting",
    "pandas": r"to_dataframe",
    "d2l": r"from d2l",
}
ONLY_ON = {"tensorflow": r"from d2l", "jax": r"LayoutMap"}
BOOK = ROOT.parent / "shared" / "data" / "timemachine.txt"


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M)


@pytest.mark.one_backend
def test_there_are_blocks():
    assert {page.name for page in PAGES if blocks(page)} >= {
        "README.md",
        "README.zh-CN.md",
        "conversion.md",
        "equations.md",
        "from-addons.md",
        "from-builtin.md",
        "from-d2l.md",
        "index.md",
        "looking-inside.md",
        "one-gate.md",
        "own-gates.md",
        "scale-out.md",
    }


@pytest.mark.one_backend
def test_no_block_is_missed():
    """Other languages have no name or stand indented, which nothing runs."""
    for page in PAGES:
        opened = re.findall(r"^ *```+ *([^\n`]*)$", page.read_text(), re.M)[::2]
        assert opened == ["python"] * len(blocks(page)), page.name


# The book's loop draws with what IPython no longer has, from `d2l==0.17.0`.
@pytest.mark.filterwarnings("ignore:`set_matplotlib_formats`:DeprecationWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_the_blocks_of(page, tmp_path, monkeypatch):
    code = "\n".join(blocks(page))
    for package, sign in NEEDS.items():
        if re.search(sign, code) and not find_spec(package):
            pytest.skip(f"{package} is not installed")
    for backend, sign in ONLY_ON.items():
        if re.search(sign, code) and keras.backend.backend() != backend:
            pytest.skip(f"runs on the {backend} backend")
    if "from d2l" in code:
        from d2l import tensorflow as d2l

        # Instead of from the net.
        text = BOOK if BOOK.exists() else ROOT / "examples" / "time_traveller.txt"
        monkeypatch.setattr(d2l, "download", lambda name: str(text))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.one_backend
@pytest.mark.parametrize("page", PAGES[:2], ids=lambda p: p.stem)
def test_the_links_of(page):
    """They are absolute, so that they work on PyPI, and lead to what is there."""
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    ours = [
        re.fullmatch(r".+/keras-scratch-lstm(?:/blob)?/main/([^#]+).*", x)
        for x in links
    ]
    assert all(link.startswith("https://") for link in links)
    assert len([match for match in ours if match]) > 10
    for match in filter(None, ours):
        assert (ROOT / match[1]).exists(), match[0]
