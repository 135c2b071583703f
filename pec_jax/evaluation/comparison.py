"""From run directories or a csv to the table, the figures and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

from etils import epath
from matplotlib.figure import Figure

from pec_jax import io
from pec_jax.evaluation import figures, table
from pec_jax.evaluation.csv_rows import rows_from_csv
from pec_jax.evaluation.report import write_report
from pec_jax.evaluation.run_table import BASE, Run, find_runs, rows_of_runs
from pec_jax.evaluation.steps import read_steps
from pec_jax.evaluation.table import Row


def compare_csv(path: epath.Path, out: epath.Path) -> list[Row]:
    """Table and quality-diversity figure of a csv; see `csv_rows.rows_from_csv`.

    Returns:
        The normalised rows.

    Raises:
        RunError: as `csv_rows.rows_from_csv` and `table.normalise`.
    """
    rows = table.normalise(rows_from_csv(path))
    drawn = {"quality_diversity": figures.quality_diversity(rows)}
    _write(rows, drawn, {}, [f"From {path.name}."], out)
    return rows


def compare_runs(directories: Sequence[epath.Path], out: epath.Path) -> list[Row]:
    """Table, figures and sample grids of finished runs; seeds of one config are one row.

    Returns:
        The normalised rows, that of the base model first.

    Raises:
        RunError: as `run_table.find_runs`, `run_table.rows_of_runs` and `table.normalise`.
    """
    found = rows_of_runs(find_runs(directories))
    rows = table.normalise([row for row, _ in found])
    steps = {
        row.label: [read_steps(run.directory / "metrics.jsonl") for run in runs]
        for row, runs in found
        if row.method != BASE
    }
    drawn = {
        "quality_diversity": figures.quality_diversity(rows),
        "training_curves": figures.training_curves(steps),
        "reward_entropy": figures.reward_entropy(steps),
    }
    grids = {row.label: path for row, runs in found if (path := _grid(row, runs))}
    count = len({run.directory for _, runs in found for run in runs})
    _write(rows, drawn, grids, [f"{count} runs, {len(rows) - 1} configs."], out)
    return rows


def _write(
    rows: Sequence[Row],
    drawn: Mapping[str, Figure],
    grids: Mapping[str, epath.Path],
    notes: Sequence[str],
    out: epath.Path,
) -> None:
    pictures = {name: _png(figure) for name, figure in drawn.items()}
    for name, png in pictures.items():
        io.write_bytes(out / "figures" / f"{name}.png", png)
    definitions = table.describe(table.ordered_columns(rows))
    io.write_text(out / "table.csv", table.write_csv(rows))
    io.write_text(out / "table.md", table.write_markdown(rows, definitions))
    titles = {name.replace("_", " ").capitalize(): png for name, png in pictures.items()}
    io.write_text(out / "report.html", write_report(rows, titles, grids, notes))
    print(_summary(rows))
    print(f"Report: {out / 'report.html'}")


def _summary(rows: Sequence[Row]) -> str:
    width = max(len(row.label) for row in rows)
    lines = [f"{'':{width}}  quality  diversity  overall"]
    for row in rows:
        quality, diversity, overall = (row.mean(name) for name in table.COMPUTED)
        lines.append(f"{row.label:{width}}  {quality:7.3f}  {diversity:9.3f}  {overall:7.3f}")
    return "\n".join(lines)


def _grid(row: Row, runs: Sequence[Run]) -> epath.Path | None:
    """The first seed's last samples; of the base model, those before training."""
    for run in runs:
        grids = sorted((run.directory / "samples").glob("step_*.png"))
        if grids:
            return grids[0] if row.method == BASE else grids[-1]
    return None


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
