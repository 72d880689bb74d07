"""Lays docstrings out for the site: a paragraph per labelled line, examples as code."""

import re
from typing import Any

import griffe

_LABEL = re.compile(r"(``[^`]+``(, ``[^`]+``| and ``[^`]+``)*:|[A-Z][A-Za-z ]*:|\d+\. )")


class DocstringLayout(griffe.Extension):
    """Rewrites each docstring's text before it is parsed; the source is not touched."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Lay out the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _fence_examples(_separate_labels(obj.docstring.value))


def _separate_labels(text: str) -> str:
    """Put a blank line before each line that opens with a label, such as ``Shapes:``."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and lines[-1].strip() and _LABEL.match(line) and not line.startswith("Raises:"):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _fence_examples(text: str) -> str:
    """Put each run of doctest lines, up to a blank line, into a code block."""
    lines: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        if not inside and line.startswith(">>> "):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join(lines).rstrip()
