"""MkDocs hooks: links to the repository, the HTML report, and equations in MathML.

Pages of `docs/` link to files outside it with relative paths, as on GitHub. On the
site, images are copied and other files become links to GitHub. The screenshot of the
HTML report is replaced by the report itself. Equations use STIX Two Math (SIL Open Font
License), which the site serves, because phones have no font for MathML.
"""

import html
import re
from importlib.resources import files as package_files
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
SOURCE = "https://github.com/keras-scratch-lstm/keras-scratch-lstm/blob/main/"
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
SCREENSHOT = re.compile(r"!\[([^\]]+)\]\(images/page\.png\)")
REPORT = r'<iframe class="gates" src="../images/gates.html" title="\1"></iframe>'
MATH = re.compile(
    r'<(div|span) class="arithmatex">\\(?:\[(.+?)\\\]|\((.+?)\\\))</\1>', re.S
)


FONT = "STIXTwoMath-Regular.ttf"


def on_files(files, config):
    font = package_files("ziamath").joinpath("fonts", FONT)
    files.append(File.generated(config, f"site/{FONT}", abs_src_path=str(font)))
    for page in files.documentation_pages():
        if "/" in page.src_uri:
            continue
        for path in OUTSIDE.findall(page.content_string):
            if not (ROOT / path).exists():
                raise FileNotFoundError(f"{page.src_uri} links to {path}.")
            if _is_image(path) and not files.get_file_from_path(path):
                files.append(File.generated(config, path, abs_src_path=ROOT / path))
    return files


def on_page_markdown(markdown, page, **kwargs):
    def link(match):
        path = match[1]
        return f"]({path if _is_image(path) else SOURCE + path}"

    if "/" in page.file.src_uri:
        return markdown
    return SCREENSHOT.sub(REPORT, OUTSIDE.sub(link, markdown))


def on_page_content(content, **kwargs):
    return MATH.sub(_mathml, content)


def _mathml(match):
    tag, block, inline = match.groups()
    math = convert(
        html.unescape(block or inline), display="block" if block else "inline"
    )
    return f'<{tag} class="math">{math}</{tag}>'


def _is_image(path):
    return path.endswith((".png", ".svg"))
