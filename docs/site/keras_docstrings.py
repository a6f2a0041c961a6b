"""Has mkdocstrings set Keras's docstrings: all their sections, and results as text."""

import re
import textwrap

import griffe

SECTION = re.compile(
    r"^(Call arguments|Returns|Example|Reference):\n(.*?)(?=^\w[\w ]*:\n|\Z)",
    re.M | re.S,
)
LINK_OVER_TWO_LINES = re.compile(r"\]\(\s+(\S+)\)")


class KerasDocstrings(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            text = LINK_OVER_TWO_LINES.sub(r"](\1)", obj.docstring.value)
            obj.docstring.value = SECTION.sub(_as_google, text)


def _as_google(match):
    name, body = match.groups()
    if name == "Call arguments":
        return f"Other parameters: Call arguments:\n{body}"
    if name == "Example":
        code = textwrap.indent(body.strip("\n"), "    ")
        return f"Examples: Example:\n{code}\n\n"
    return f"**{name}:**\n\n{textwrap.dedent(body)}"
