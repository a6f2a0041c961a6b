"""Griffe extension: render every section of Keras's docstring format."""

import re
import textwrap

import griffe

SECTION = re.compile(
    r"^(Call arguments|Returns|Example|References?):\n(.*?)(?=^\w[\w ]*:\n|\Z)",
    re.M | re.S,
)
WRAPPED_LINK = re.compile(r"\]\(\s+(\S+)\)")


class KerasDocstrings(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            text = WRAPPED_LINK.sub(r"](\1)", obj.docstring.value)
            obj.docstring.value = SECTION.sub(_as_google, text)


def _as_google(match):
    name, body = match.groups()
    if name == "Call arguments":
        return f"Other parameters: Call arguments:\n{body}"
    if name == "Example":
        code = textwrap.indent(body.strip("\n"), "    ")
        return f"Examples: Example:\n{code}\n\n"
    return f"**{name}:**\n\n{textwrap.dedent(body)}"
