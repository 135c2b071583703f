"""When runs are as good as the reference, at what cost, and how diverse they are then.

From the curves of time_to_quality.py to its table and figure.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from benchmarks import recipes
from pec_jax.evaluation.figures import spread_out
from pec_jax.evaluation.table import student_interval
from pec_jax.io import write_text

SHARE = 0.9  # of the reference's gain
LABEL_SIZE = 7  # points
HEADING = """# Time to quality: the table

Means over the seeds that arrived, with 95% intervals of Student's t. *Diversity then* is on
arrival, of the base model's.

"""
COLUMNS = 3  # of the figure, a divisor of the number of kinds


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is kept of a run."""

    recipe: str
    seed: str
    iterations: list[float]  # when it was evaluated, from 0
    quality: list[float]
    diversity: list[float]
    flops: int  # of an iteration
    seconds: float  # of an iteration


@dataclasses.dataclass(frozen=True)
class Arrival:
    """When a run was as good as the reference; NaN where it never was."""

    iterations: float
    flops: float
    seconds: float
    diversity: float  # then, of the base model's


def read_curves(path: Path) -> dict[str, Curve]:
    """Name of a run -> its curve, as kept; nothing where there is no file."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {name: Curve(**fields) for name, fields in kept.items()}


def write_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """One line for each run."""
    lines = [f"{json.dumps(n)}: {json.dumps(dataclasses.asdict(c))}" for n, c in curves.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def target_of(curves: Iterable[Curve]) -> float:
    """The quality to be reached, from the reference's seeds."""
    gains = [c for c in curves if c.recipe == recipes.REFERENCE.name]
    base = np.mean([c.quality[0] for c in gains])
    return float(base + SHARE * (np.mean([c.quality[-1] for c in gains]) - base))


def first_reached(x: Sequence[float], y: Sequence[float], target: float) -> float:
    """The first x at which the line through the points is at the target, from below; or NaN."""
    for (x_0, y_0), (x_1, y_1) in zip(zip(x, y), zip(x[1:], y[1:])):
        if y_0 < target <= y_1:
            return x_0 + (x_1 - x_0) * (target - y_0) / (y_1 - y_0)
    return math.nan


def arrival(curve: Curve, target: float) -> Arrival:
    """When, at what cost, and how diverse."""
    iterations = first_reached(curve.iterations, curve.quality, target)
    diversity = float(np.interp(iterations, curve.iterations, curve.diversity))
    return Arrival(
        iterations=iterations,
        flops=iterations * curve.flops,
        seconds=iterations * curve.seconds,
        diversity=diversity / curve.diversity[0],
    )


def by_recipe(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Recipe -> the curves of its seeds, in the order of recipes.py."""
    found: dict[str, list[Curve]] = {recipe.name: [] for recipe in recipes.all_recipes()}
    for curve in curves:
        found.setdefault(curve.recipe, []).append(curve)
    return {name: seeds for name, seeds in found.items() if seeds}


def write_table(found: Mapping[str, Sequence[Curve]], target: float) -> str:
    """Markdown: a row a recipe, means over the seeds that arrived, with 95% intervals."""
    lines = [
        "| recipe | iterations | TFLOP | of all steps' | seconds | diversity then | at the end: "
        "quality | diversity | arrived |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    plain = _flops(found.get(recipes.REFERENCE.name, ()), target)
    for name, seeds in found.items():
        there = [a for a in (arrival(c, target) for c in seeds) if not math.isnan(a.iterations)]
        ends = [
            _cell([c.quality[-1] for c in seeds], 3),
            _cell([c.diversity[-1] / c.diversity[0] for c in seeds], 2),
            f"{len(there)} of {len(seeds)}",
        ]
        cells = [
            _cell([a.iterations for a in there], 1),
            _cell([a.flops / 1e12 for a in there], 2),
            _cell([a.flops / np.mean(plain) for a in there] if plain else [], 2),
            _cell([a.seconds for a in there], 0),
            _cell([a.diversity for a in there], 2),
        ]
        lines.append("| " + " | ".join([name, *cells, *ends]) + " |")
    return "\n".join(lines) + "\n"


def _flops(curves: Sequence[Curve], target: float) -> list[float]:
    found = [arrival(curve, target).flops for curve in curves]
    return [flops for flops in found if not math.isnan(flops)]


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    found = student_interval(values)
    return f"{found.mean:.{digits}f} ± {found.half:.{digits}f}"


def draw(found: Mapping[str, Sequence[Curve]], target: float) -> Figure:
    """Quality against FLOPs, with the diversity as colour: two panels a kind of recipe.

    The upper without PEC, the lower with it; the reference is the grey line of every panel.
    """
    figure = Figure(figsize=(11, 13), layout="constrained")
    panels = figure.subplots(2 * len(recipes.KINDS) // COLUMNS, COLUMNS, sharex=True, sharey=True)
    pairs = panels.reshape(-1, 2, COLUMNS).swapaxes(1, 2).reshape(-1, 2)  # above, below
    reference, points, ends = found[recipes.REFERENCE.name], None, {}
    for pair, (kind, members) in zip(pairs, recipes.KINDS.items()):
        for axes, form in zip(pair, (lambda recipe: recipe, recipes.with_pec)):
            axes.plot(*_means(reference)[:2], color="0.6", lw=2.5, alpha=0.6, zorder=0)
            axes.axhline(target, color="0.5", ls="--", lw=1)
            axes.grid(alpha=0.3)
            names = [form(recipe).name for recipe in members]
            points, ends[axes] = _plot(axes, {n: found[n] for n in names if n in found}, points)
        pair[0].set_title(kind)
        pair[1].set_title(f"{kind}, with PEC")
    figure.supxlabel("TFLOP")
    figure.supylabel("PickScore, held-out prompts")
    for axes, names in ends.items():  # now that the limits, which all share, are known
        _write_names(axes, names)
    if points is not None:
        label = "entropy of what prompts leave open, of the base's"
        figure.colorbar(
            points, ax=panels, label=label, location="bottom", pad=0.01, aspect=60, fraction=0.02
        )
    return figure


def _means(seeds: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TFLOP, quality and diversity (of the base's), the mean of the seeds."""
    tflop = np.asarray(seeds[0].iterations) * seeds[0].flops / 1e12
    quality = np.mean([curve.quality for curve in seeds], axis=0)
    diversity = np.mean([np.asarray(c.diversity) / c.diversity[0] for c in seeds], axis=0)
    return tflop, quality, diversity


def _plot(
    axes: Axes, rows: Mapping[str, Sequence[Curve]], points: PathCollection | None
) -> tuple[PathCollection | None, dict[str, tuple[float, float]]]:
    """The rows of one panel: the last one's points, and where the curve of each name ends."""
    ends = {}
    for name, seeds in rows.items():
        tflop, quality, diversity = _means(seeds)
        axes.plot(tflop, quality, color="0.8", lw=0.8, zorder=1)
        points = axes.scatter(
            tflop, quality, c=diversity, s=14, cmap="viridis", vmin=0, vmax=1, zorder=2
        )
        ends[name.removesuffix(recipes.WITH_PEC)] = (tflop[-1], quality[-1])
    return points, ends


def _write_names(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Each name at the right edge, with a line to the end of its curve."""
    low, high = axes.get_ylim()
    heights = spread_out([(y - low) / (high - low) for _, y in ends.values()], 0.07)
    for (name, end), height in zip(ends.items(), heights):
        axes.annotate(
            name,
            xy=end,
            xytext=(1.02, height),
            textcoords="axes fraction",
            fontsize=LABEL_SIZE,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.5"},
        )
