"""A report in one HTML file: the table, the figures, and sample grids side by side.

Pictures are embedded and nothing is fetched or run, so that the file can be mailed and opened
anywhere.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence

from etils import epath

from pec_jax.evaluation.table import (
    COMPUTED,
    LABELS,
    Row,
    describe,
    format_number,
    ordered_columns,
    ranks_of,
    student_interval,
)

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884;
  white-space: nowrap; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
td.best { font-weight: 700; } td.second { text-decoration: underline; }
td.computed, th.computed { background: #8881; }
img { max-width: 100%; height: auto; background: #fff; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0 0 1rem; } figcaption { font-weight: 600; }
"""


def write_report(
    rows: Sequence[Row],
    figures: Mapping[str, bytes],
    grids: Mapping[str, epath.Path],
    notes: Sequence[str] = (),
) -> str:
    """The report's HTML.

    Args:
        rows: normalised.
        figures: title -> PNG.
        grids: row label -> PNG file of its samples; may be empty.
        notes: sentences under the heading.

    Returns:
        One self-contained HTML document.
    """
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    parts += ["<h2>Table</h2>", f'<div class="wide">{_table(rows)}</div>', _definitions(rows)]
    for title, png in figures.items():
        parts += [f"<h2>{html.escape(title)}</h2>", _image(png, title)]
    if grids:
        parts.append("<h2>Samples</h2><p>The same prompts and the same noise in every grid.</p>")
        cells = [
            f"<figure><figcaption>{html.escape(label)}</figcaption>"
            f"{_image(path.read_bytes(), label)}</figure>"
            for label, path in grids.items()
        ]
        parts.append(f'<div class="grids">{"".join(cells)}</div>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pec_jax: comparison</title><style>{STYLE}</style></head><body>"
        "<h1>Comparison</h1>" + "\n".join(parts) + "</body></html>\n"
    )


def _table(rows: Sequence[Row]) -> str:
    columns = ordered_columns(rows)
    ranks = {column: ranks_of([row.mean(column) for row in rows]) for column in columns}
    heading = "".join(f"<th>{name}</th>" for name in (*LABELS, "seeds"))
    heading += "".join(f"<th{_computed(c)}>{html.escape(c)}</th>" for c in columns)
    body = []
    for index, row in enumerate(rows):
        cells = [
            f"<td>{html.escape(text)}</td>"
            for text in (row.method, row.perceptual_space, row.weight, str(len(row.seeds)))
        ]
        for column in columns:
            mean, half = student_interval(list(row.values[column].values()))
            text = format_number(mean) + ("" if math.isnan(half) else f" ± {half:.2g}")
            mark = {0: "best", 1: "second"}.get(ranks[column][index], "")
            cells.append(f"<td{_computed(column, mark)}>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{heading}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _computed(column: str, mark: str = "") -> str:
    names = " ".join(filter(None, ("computed" if column in COMPUTED else "", mark)))
    return f' class="{names}"' if names else ""


def _definitions(rows: Sequence[Row]) -> str:
    items = "".join(
        f"<li><code>{html.escape(name)}</code>: {html.escape(text)}</li>"
        for name, text in describe(ordered_columns(rows)).items()
    )
    return (
        "<p>Mean ± half the 95% interval (Student's t over seeds); the best of a column is bold, "
        f"the second best underlined.</p><ul>{items}</ul>"
    )


def _image(png: bytes, title: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(title, quote=True)}" src="data:image/png;base64,{data}">'
