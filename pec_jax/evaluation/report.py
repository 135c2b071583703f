"""A report in one HTML file: who wins, sample grids side by side, the table, the figures.

Pictures, style and script are embedded and nothing is fetched, so that the file can be mailed and
opened anywhere. Its policy lets no other script run than our own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from etils import epath
from PIL import Image

from pec_jax.evaluation.table import (
    COMPUTED,
    DIVERSITY,
    OVERALL,
    QUALITY,
    Row,
    describe,
    format_number,
    ordered_columns,
    ranks_of,
    student_interval,
)
from pec_jax.evaluation.verdict import by_overall, leaders, verdict

Grids = Mapping[str, Mapping[int, epath.Path]]  # row label -> iteration -> PNG of its samples

ASSETS = Path(__file__).parent / "assets"
MOST_STEPS = 9  # of a row's grids, so that the file can still be mailed
_SHORT = {OVERALL: "overall", QUALITY: "quality", DIVERSITY: "diversity"}


def write_report(
    rows: Sequence[Row], charts: Mapping[str, str], grids: Grids, notes: Sequence[str] = ()
) -> str:
    """The report's HTML.

    Args:
        rows: normalised.
        charts: title -> SVG element, as of `charts.svg`; `data-row` counts `rows`.
        grids: may be empty.
        notes: sentences under the first one.

    Returns:
        One self-contained HTML document.
    """
    style, script = ((ASSETS / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    shown = [row.label for row in leaders(rows) if row is not None and row.label in grids]
    shown = list(dict.fromkeys(shown))
    parts = [
        "<h1>pec_jax: comparison</h1>",
        f'<p class="verdict">{html.escape(verdict(rows))}</p>',
        *(f'<p class="quiet">{html.escape(note)}</p>' for note in notes),
        _side_by_side({label: grids[label] for label in shown}),
        "<h2>Table</h2>",
        f'<div class="wide">{_table(rows)}</div>',
        _definitions(rows),
    ]
    for title, svg in charts.items():
        parts.append(f'<h2>{html.escape(title)}</h2><div class="chart">{svg}</div>')
    others = {label: steps for label, steps in grids.items() if label not in shown}
    parts += [_last_grids(others), '<div id="tip" hidden></div>', _labels(rows)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pec_jax: comparison</title><style>{style}</style></head><body>"
        + "\n".join(filter(None, parts))
        + f"<script>{script}</script></body></html>\n"
    )


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )


def _labels(rows: Sequence[Row]) -> str:
    """The labels of the rows as JSON that ends no script element."""
    text = json.dumps([row.label for row in rows]).replace("<", "\\u003c")
    return f'<script type="application/json" id="labels">{text}</script>'


def _side_by_side(grids: Grids) -> str:
    """The base model, the objective alone and the best, with a slider over their training."""
    if not grids:
        return ""
    chosen = {label: _some(sorted(found)) for label, found in grids.items()}
    steps = sorted(set().union(*chosen.values()))
    figures = "".join(_figure(label, grids[label], chosen[label]) for label in grids)
    slider = ""
    if len(steps) > 1:
        slider = (
            '<label class="slider">Training <input type="range" min="0" '
            f'max="{len(steps) - 1}" value="{len(steps) - 1}" data-steps="{steps}">'
            f"<output>iteration {steps[-1]}</output></label>"
        )
    return (
        f'<h2>Samples</h2>{slider}<div class="grids">{figures}</div>'
        '<p class="quiet">The same prompts and the same noise in every grid.</p>'
    )


def _some(steps: Sequence[int]) -> list[int]:
    """At most MOST_STEPS of them, with the first and the last."""
    count = min(MOST_STEPS, len(steps))
    return [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]


def _figure(label: str, grids: Mapping[int, epath.Path], steps: Sequence[int]) -> str:
    images = [
        f'<img data-step="{step}" alt="{html.escape(f"{label}, iteration {step}")}"'
        f'{"" if step == steps[-1] else " hidden"} src="{_embedded(grids[step])}">'
        for step in steps
    ]
    return (
        f"<figure data-steps><figcaption>{html.escape(label)}</figcaption>"
        f"{''.join(images)}</figure>"
    )


def _last_grids(grids: Grids) -> str:
    """The last grid of every row that is not shown above."""
    if not grids:
        return ""
    cells = [
        f"<figure><figcaption>{html.escape(label)}</figcaption>"
        f'<img alt="{html.escape(label)}" src="{_embedded(steps[max(steps)])}"></figure>'
        for label, steps in grids.items()
    ]
    return (
        "<h2>More samples</h2><details><summary>The last grid of each other row</summary>"
        f'<div class="grids">{"".join(cells)}</div></details>'
    )


def _table(rows: Sequence[Row]) -> str:
    """By falling `overall`, which stands first; rows keep their index as `data-row`."""
    others = [name for name in ordered_columns(rows) if name not in COMPUTED]
    columns = [OVERALL, QUALITY, DIVERSITY, *others]
    ranks = {column: ranks_of([row.mean(column) for row in rows]) for column in columns}
    heading = '<th class="label"><button>method</button></th>'
    for column in columns:
        sort = ' aria-sort="descending"' if column == OVERALL else ""
        name = html.escape(_SHORT.get(column, column))
        heading += f"<th{_classes(column)}{sort}><button>{name}</button></th>"
    indices = {id(row): index for index, row in enumerate(rows)}
    body = "".join(
        _table_row(row, indices[id(row)], {c: ranks[c][indices[id(row)]] for c in columns})
        for row in by_overall(rows)
    )
    heading += "<th><button>seeds</button></th>"
    return f"<table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"


def _table_row(row: Row, index: int, ranks: Mapping[str, int]) -> str:
    label = html.escape(row.label)
    cells = [f'<td class="label" data-value="{label}">{label}</td>']
    for column, rank in ranks.items():
        mean, half = student_interval(list(row.values[column].values()))
        text = format_number(mean) + ("" if math.isnan(half) else f" ± {half:.2g}")
        mark = {0: "best", 1: "second"}.get(rank, "")
        cells.append(f'<td{_classes(column, mark)} data-value="{mean:.9g}">{text}</td>')
    count = len(row.seeds)
    cells.append(f'<td data-value="{count}">{count}</td>')
    return f'<tr data-row="{index}">{"".join(cells)}</tr>'


def _classes(column: str, mark: str = "") -> str:
    names = [
        "computed" if column in COMPUTED else "",
        "overall" if column == OVERALL else "",
        mark,
    ]
    joined = " ".join(filter(None, names))
    return f' class="{joined}"' if joined else ""


def _definitions(rows: Sequence[Row]) -> str:
    items = "".join(
        f"<li><code>{html.escape(_SHORT.get(name, name))}</code>: {html.escape(text)}</li>"
        for name, text in describe(ordered_columns(rows)).items()
    )
    return (
        '<p class="quiet">Mean ± half the 95% interval (Student\'s t over seeds); the best of a '
        "column is bold, the second best underlined.</p>"
        f"<details><summary>What the columns mean</summary><ul>{items}</ul></details>"
    )


def _embedded(path: epath.Path) -> str:
    """An image file as a `data:` address, as WebP, which is smaller than a PNG."""
    buffer = BytesIO()
    with Image.open(BytesIO(path.read_bytes())) as image:
        image.convert("RGB").save(buffer, format="webp", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
