"""From run directories or a csv to the table, the figures and the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO

from etils import epath
from matplotlib.figure import Figure

from pec_jax import io
from pec_jax.errors import RunError
from pec_jax.evaluation import charts, figures, table
from pec_jax.evaluation.csv_rows import rows_from_csv
from pec_jax.evaluation.report import Grids, write_report
from pec_jax.evaluation.run_table import BASE, Run, find_runs, rows_of_runs
from pec_jax.evaluation.steps import read_steps
from pec_jax.evaluation.table import Row
from pec_jax.evaluation.verdict import verdict

TITLES = {
    "quality_diversity": "Quality and diversity",
    "training_curves": "Training",
    "reward_entropy": "Reward and perceptual entropy",
}


def compare_csv(path: epath.Path, out: epath.Path) -> list[Row]:
    """Table and quality-diversity figure of a csv; see `csv_rows.rows_from_csv`.

    Returns:
        The normalised rows.

    Raises:
        RunError: as `csv_rows.rows_from_csv` and `table.normalise`.
    """
    rows = rows_of_csv(path)
    drawn = {"quality_diversity": figures.quality_diversity(rows)}
    _write(rows, drawn, {}, [f"From {path.name}."], out)
    return rows


def rows_of_csv(path: epath.Path) -> list[Row]:
    """The normalised rows of a csv.

    Raises:
        RunError: as `compare_csv`; the message names the file.
    """
    rows = rows_from_csv(path)
    try:
        return table.normalise(rows)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None


def compare_runs(directories: Sequence[epath.Path], out: epath.Path) -> list[Row]:
    """Table, figures and sample grids of finished runs; seeds of one config are one row.

    Returns:
        The normalised rows, that of the base model first.

    Raises:
        RunError: as `run_table.find_runs`, `run_table.rows_of_runs` and `table.normalise`.
    """
    found = rows_of_runs(find_runs(directories))
    rows = table.normalise([row for row, _ in found])
    # A label that did not train keeps its place, and with it its colour in every figure.
    steps = {
        row.label: []
        if row.method == BASE
        else [read_steps(run.directory / "metrics.jsonl") for run in runs]
        for row, runs in found
    }
    drawn = {
        "quality_diversity": figures.quality_diversity(rows),
        "training_curves": figures.training_curves(steps),
        "reward_entropy": figures.reward_entropy(steps),
    }
    grids = {row.label: there for row, runs in found if (there := _grids(row, runs))}
    count = len({run.directory for _, runs in found for run in runs})
    _write(rows, drawn, grids, [f"{count} runs, {len(rows) - 1} configs."], out)
    return rows


def _write(
    rows: Sequence[Row],
    drawn: Mapping[str, Figure],
    grids: Grids,
    notes: Sequence[str],
    out: epath.Path,
) -> None:
    svgs = {TITLES[name]: charts.svg(figure, name, TITLES[name]) for name, figure in drawn.items()}
    for name, figure in drawn.items():
        io.write_bytes(out / "figures" / f"{name}.png", _png(figure))
    definitions = table.describe(table.ordered_columns(rows))
    io.write_text(out / "table.csv", table.write_csv(rows))
    io.write_text(out / "table.md", table.write_markdown(rows, definitions))
    io.write_text(out / "report.html", write_report(rows, svgs, grids, notes))
    print(_summary(rows))
    print(verdict(rows))
    print(f"Report: {out / 'report.html'}")


def _summary(rows: Sequence[Row]) -> str:
    width = max(len(row.label) for row in rows)
    lines = [f"{'':{width}}  quality  diversity  overall"]
    for row in rows:
        quality, diversity, overall = (row.mean(name) for name in table.COMPUTED)
        lines.append(f"{row.label:{width}}  {quality:7.3f}  {diversity:9.3f}  {overall:7.3f}")
    return "\n".join(lines)


def _grids(row: Row, runs: Sequence[Run]) -> dict[int, epath.Path]:
    """Iteration -> the samples of the first seed that has any; of the base model, the first."""
    for run in runs:
        found = {
            int(match[1]): path
            for path in sorted((run.directory / "samples").glob("step_*.png"))
            if (match := re.fullmatch(r"step_(\d+)\.png", path.name))
        }
        if found:
            return {min(found): found[min(found)]} if row.method == BASE else found
    return {}


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
