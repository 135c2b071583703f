"""Other people's words in a table: shown as they are, and taken for nothing else.

A cell of a csv may not begin as a formula of a spreadsheet does; one of markdown may hold no markup
and no end of the cell.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

_FORMULA = ("=", "+", "-", "@")
_MARKUP = re.compile(r"([\\`*\[\]|~$])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def one_line(text: str) -> str:
    """A text without breaks, and with a sign in the place of what cannot be shown."""
    spaced = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def plain(text: str) -> str:
    """A cell that no spreadsheet takes for a formula; numbers stay."""
    if not text.lstrip().startswith(_FORMULA) and not text.startswith(("\t", "\r")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Lines of a csv file; texts are made `plain`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow([plain(cell) if isinstance(cell, str) else cell for cell in row])
    return out.getvalue()


def markdown(text: str) -> str:
    """A cell of a markdown table that shows the text."""
    escaped = _MARKUP.sub(r"\\\1", one_line(text))
    return "".join(_HTML.get(character, character) for character in escaped)
