"""Every block of Python in the README and in docs/ runs, in the order of its page."""

import re
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M)


def test_there_are_blocks():
    assert {page.name for page in PAGES if blocks(page)} >= {
        "README.md",
        "conversion.md",
        "looking-inside.md",
        "one-gate.md",
        "scale-out.md",
    }


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_the_blocks_of(page, tmp_path, monkeypatch):
    for package in ("matplotlib", "pandas"):
        if f"{package}" in page.read_text() or "to_dataframe" in page.read_text():
            pytest.importorskip(package)
    if page.stem == "scale-out" and keras.backend.backend() != "jax":
        pytest.skip("keras.distribution lays out weights on JAX alone")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
