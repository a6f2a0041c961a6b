"""Draws the pictures of `looking-inside.md` anew, and the cell of `equations.md`.

    python docs/draw.py

They are those of `examples/look_inside.py` as it runs by default; its page, of the
first characters alone; and a screenshot of that, for which Playwright and a Chromium
are needed.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

import draw_cell  # noqa: E402
import look_inside  # noqa: E402
from book_text import BUNDLED  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

PICTURES = ("gates.png", "heatmap.png", "saturation.png", "text.png")
ON_THE_PAGE = 700  # characters


def main():
    images = DOCS / "images"
    draw_cell.main()
    with tempfile.TemporaryDirectory() as folder:
        if error := look_inside.main(["--out", folder]):
            return error
        for name in PICTURES:
            shutil.copyfile(Path(folder, name), images / name)
        short = ["--text", str(BUNDLED), "--characters", str(ON_THE_PAGE)]
        model = str(Path(folder, "model.keras"))
        if error := look_inside.main([model, *short, "--out", folder]):
            return error
        shutil.copyfile(Path(folder, "gates.html"), images / "gates.html")
        photograph(images / "gates.html", images / "page.png")
    return 0


def photograph(page_path, path):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 400})
        page.goto(page_path.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.hover("#text span[data-step='150']")
        page.screenshot(path=path, full_page=True)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
