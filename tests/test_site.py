"""The site builds without warnings and requests nothing from other hosts."""

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reference import run_python

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.ci, pytest.mark.one_backend]


class Resources(HTMLParser):
    """The URLs that a browser loads with a page."""

    def __init__(self, text):
        super().__init__()
        self.urls = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe", "source") and "src" in attributes:
            self.urls.append(attributes["src"])
        if tag == "link" and attributes["rel"] not in ("canonical", "next", "prev"):
            self.urls.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    options = ["--config-file", ROOT / "mkdocs.yml", "--site-dir", folder]
    run_python("-m", "mkdocs", "build", "--strict", *options)
    return folder


def test_site_requests_nothing_from_other_hosts(site):
    pages = list(site.rglob("index.html"))
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        urls = Resources(page.read_text()).urls
        assert urls
        for url in urls:
            assert (page.parent / url.partition("?")[0]).exists(), (page, url)
    style = site / "site" / "style.css"
    for url in re.findall(r"url\([\"']?([^)\"']+)", style.read_text()):
        assert (style.parent / url).exists(), url


def test_site_embeds_the_html_report(site):
    page = (site / "inspecting-gates" / "index.html").read_text()
    assert "../images/gates.html" in Resources(page).urls
    assert Resources((site / "images" / "gates.html").read_text()).urls == []


def test_pages_are_rendered(site):
    for page, least in (("equations", 20), ("backward-pass", 15)):
        text = (site / page / "index.html").read_text()
        assert text.count("<math ") >= least
        assert not re.search(r"arithmatex|\\[a-z]+\{", text)
    text = "".join(page.read_text() for page in site.glob("api/*/index.html"))
    signatures = re.findall(r'<div class="doc-signature.*?</div>', text, re.S)
    assert len(signatures) > 40
    # One argument per line, which needs a formatter in the extra `docs`.
    lines = re.sub(r"<[^>]+>", "", "\n".join(signatures)).splitlines()
    assert max(map(len, lines)) <= 90
    text = (site / "index.html").read_text()
    (tabs,) = re.findall(r'<ul class="md-tabs__list">(.*?)</ul>', text, re.S)
    assert 1 < tabs.count("<li") <= 6


def test_cell_diagram_is_up_to_date(tmp_path):
    path = ROOT / "docs" / "draw_cell.py"
    spec = importlib.util.spec_from_file_location("draw_cell", path)
    draw_cell = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_cell)
    draw_cell.main(tmp_path / "cell.svg")
    assert (tmp_path / "cell.svg").read_bytes() == draw_cell.PATH.read_bytes()
