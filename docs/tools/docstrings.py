"""Griffe extension: docstrings as they are written here, for a terminal, become the Markdown of the site.

A table ("name    what it is", aligned by two spaces or more) becomes a table, what is indented a block of code;
:class:`Name` becomes `Name`.
"""

import re
import textwrap
from typing import Any

import griffe

ROW = re.compile(r"(\S(?:.*?\S)?) {2,}(?=\S)")
ROLE = re.compile(r":(?:py:)?(?:class|func|meth|mod|attr|data|exc):`~?([^`]*)`")
SECTION = re.compile(r"(Args|Arguments|Returns|Yields|Raises|Attributes|Examples?|Warns|Notes?):\s*$")


def table(lines: list[str]) -> str | None:
    """Lines of two columns as a Markdown table; None where they are no such lines."""
    first = ROW.match(lines[0])
    if first is None:
        return None
    column, rows = first.end(), []
    for line in lines:
        name, text = line[:column], line[column:]
        if name.strip() and not name.endswith(" "):
            return None
        if name.strip():
            rows.append([name.strip(), text])
        else:
            rows[-1][1] += f" {text.strip()}"
    cells = [f"| `{name.strip('`')}` | {text.replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(["|  |  |", "|---|---|", *cells])


def markdown(text: str) -> str:
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if SECTION.match(lines[0]):
            found.append(ROLE.sub(r"`\1`", paragraph))
        elif all(line.startswith("    ") for line in lines):
            found.append(f"```text\n{textwrap.dedent(paragraph)}\n```")
        else:
            found.append(table(lines) or ROLE.sub(r"`\1`", paragraph))
    return "\n\n".join(found)


class Tables(griffe.Extension):
    """Applied to every object that griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
