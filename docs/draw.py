"""Draw the images of the documentation.

    python docs/draw.py

The plots and the HTML report are those of `examples/look_inside.py` and
`examples/experiment.py` with their default arguments; the report covers fewer
characters. The screenshot of the report needs Playwright and Chromium.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

IMAGES = Path(__file__).parent / "images"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import draw_cell  # noqa: E402
import experiment  # noqa: E402
import look_inside  # noqa: E402
from helpers.book_text import BUNDLED  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

PLOTS = ("gates.png", "heatmap.png", "saturation.png", "text.png")
CHARACTERS = 700  # in the report


def main():
    draw_cell.main()
    with tempfile.TemporaryDirectory() as folder:
        if error := look_inside.main(["--out", folder]):
            return error
        for name in PLOTS:
            shutil.copyfile(Path(folder, name), IMAGES / name)
        model = str(Path(folder, "model.keras"))
        arguments = ["--text", str(BUNDLED), "--characters", str(CHARACTERS)]
        if error := look_inside.main([model, *arguments, "--out", folder]):
            return error
        shutil.copyfile(Path(folder, "gates.html"), IMAGES / "gates.html")
        if error := experiment.main(["--out", folder]):
            return error
        for name in ("ablation.png", "gradients.png"):
            shutil.copyfile(Path(folder, name), IMAGES / name)
    take_screenshot(IMAGES / "gates.html", IMAGES / "page.png")
    return 0


def take_screenshot(report, path):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 400})
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.hover("#text span[data-step='150']")
        page.screenshot(path=path, full_page=True)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
