"""Lets the pages in docs/ point at the rest of the repository, as they do on GitHub.

A picture outside docs/ is taken along; any other file becomes a link to GitHub. And
where GitHub shows a picture of the page of gates, the site has the page itself.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
SOURCE = "https://github.com/keras-scratch-lstm/keras-scratch-lstm/blob/main/"
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
PICTURE_OF_THE_PAGE = re.compile(r"!\[([^\]]+)\]\(images/page\.png\)")
THE_PAGE = r'<iframe class="gates" src="../images/gates.html" title="\1"></iframe>'


def on_files(files, config):
    for page in files.documentation_pages():
        for path in OUTSIDE.findall(page.content_string):
            if not (ROOT / path).exists():
                raise FileNotFoundError(f"{page.src_uri} points at {path}.")
            if _is_picture(path) and not files.get_file_from_path(path):
                files.append(File.generated(config, path, abs_src_path=ROOT / path))
    return files


def on_page_markdown(markdown, page, **kwargs):
    def link(match):
        path = match[1]
        return f"]({path if _is_picture(path) else SOURCE + path}"

    return PICTURE_OF_THE_PAGE.sub(THE_PAGE, OUTSIDE.sub(link, markdown))


def _is_picture(path):
    return path.endswith((".png", ".svg"))
