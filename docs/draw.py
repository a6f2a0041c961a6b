"""Draw the images of the documentation.

    python docs/draw.py

The plots and the HTML report are those of `examples/look_inside.py` and
`examples/experiment.py` with their default arguments, and that of the home page; the
report covers fewer characters. Its screenshot needs Playwright and Chromium.
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
from helpers.book_text import BUNDLED, load_text  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from keras_scratch_lstm import GateTrace, plotting  # noqa: E402

PLOTS = ("gates.png", "heatmap.png", "saturation.png", "text.png")
CHARACTERS = 700  # in the report


def main():
    draw_cell.main()
    with tempfile.TemporaryDirectory() as folder:
        if error := look_inside.main(["--out", folder]):
            return error
        for name in PLOTS:
            shutil.copyfile(Path(folder, name), IMAGES / name)
        draw_first_lines(GateTrace.load(Path(folder, "trace.npz")))
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
    draw_example()
    return 0


def draw_first_lines(trace):
    """Draw the picture of the home page."""
    text = load_text(BUNDLED).characters[: trace.c.shape[1]]
    unit = look_inside.print_selective_units(trace, text)[0]
    options = {"tokens": text, "steps": slice(0, 4 * look_inside.LINE)}
    plotting.plot_text(trace, unit=unit, **options, path=IMAGES / "home.png")


def draw_example():
    """Run the example of the home page."""
    page, names = (IMAGES.parent / "index.md").read_text(), {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    names["figure"].savefig(IMAGES / "silenced.png", dpi=150)


def take_screenshot(report, path):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 860})
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.hover(".text span[data-step='150'] >> nth=0")
        page.screenshot(path=path, full_page=True)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
