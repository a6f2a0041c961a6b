"""The site is built without a warning, and asks nothing of other hosts."""

import importlib.util
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.one_backend


class Loads(HTMLParser):
    """What a browser loads with a page."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe", "source") and "src" in attributes:
            self.found.append(attributes["src"])
        if tag == "link" and attributes["rel"] not in ("canonical", "next", "prev"):
            self.found.append(attributes["href"])


def test_the_site(tmp_path):
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    options = ["--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    pages = list(tmp_path.rglob("index.html"))
    assert len(pages) > 10
    for page in pages:
        loads = Loads(page.read_text()).found
        assert loads
        for url in loads:
            assert (page.parent / url.partition("?")[0]).exists(), (page, url)
    gates = tmp_path / "images" / "gates.html"
    assert (
        "../images/gates.html"
        in Loads((tmp_path / "looking-inside" / "index.html").read_text()).found
    )
    assert Loads(gates.read_text()).found == []


def test_the_cell_is_as_drawn(tmp_path):
    path = ROOT / "docs" / "draw_cell.py"
    spec = importlib.util.spec_from_file_location("draw_cell", path)
    draw_cell = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_cell)
    draw_cell.main(tmp_path / "cell.svg")
    assert (tmp_path / "cell.svg").read_bytes() == draw_cell.PATH.read_bytes()
