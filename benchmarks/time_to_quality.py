"""How much each recipe costs until it is as good as plain Flow-GRPO, and how diverse it is then.

    python benchmarks/time_to_quality.py --runs=runs/time_to_quality \\
        --out=docs/results/time_to_quality

Every recipe of recipes.py, with PEC and without, is trained on the embedded world for as many FLOPs
as ITERATIONS iterations of plain Flow-GRPO, and evaluated on the way. A run is there when its
reward on held-out prompts has risen by SHARE of what plain Flow-GRPO's rises by in the end (the
mean of its seeds); between two evaluations a straight line is drawn. FLOPs are counted from the
program, seconds are the median iteration's of the runs, --jobs of which share the machine.

The curves are kept in OUT/curves.json, beside table.md and quality.png that are made of them: runs
whose curve is there are not trained again, and an interrupted command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import jobs as runner  # noqa: E402

from benchmarks import recipes  # noqa: E402
from pec_jax.errors import exit_on_user_error, quiet_libraries  # noqa: E402
from pec_jax.evaluation import steps as files  # noqa: E402
from pec_jax.evaluation.table import student_interval  # noqa: E402
from pec_jax.io import write_text  # noqa: E402

CONFIG = ROOT / "configs" / "shapes_study.py"
ITERATIONS = 60  # of the reference; plain Flow-GRPO has reached its plateau by then
MOST = 120  # iterations of any run
EVALUATIONS = 15  # of a run, the last one included
SHARE = 0.9
QUALITY, DIVERSITY = "quality/pickscore", "diversity/attributes"


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


# From runs to curves.


def length(flops: int, reference: int) -> int:
    """Iterations of a run: as many FLOPs as the reference's, and a multiple of EVALUATIONS."""
    iterations = min(MOST, ITERATIONS * reference / flops)
    return EVALUATIONS * max(1, round(iterations / EVALUATIONS))


def job(runs: Path, recipe: recipes.Recipe, seed: str, iterations: int) -> runner.Job:
    """One run, evaluated on its way."""
    fields = {
        **{name: _typed(value) for name, value in recipe.fields.items()},
        "num_iterations": str(iterations),
        "schedule.eval_every": str(iterations // EVALUATIONS),
        "eval.num_prompts": "24",
        "eval.images_per_prompt": "8",
        "eval.sample_rows": "4",
        "eval.sample_columns": "8",
        "eval.entropy_probes": "0",
        "seed": seed,
    }
    return runner.Job(runs / f"{recipe.label}_seed={seed}", CONFIG, tuple(fields.items()))


def _typed(value: object) -> str:
    return repr(value) if isinstance(value, tuple) else str(value)


def read_curve(recipe: recipes.Recipe, seed: str, directory: Path) -> Curve:
    """The curve of a finished run."""
    found = files.read_evaluations(directory)
    steps = files.read_steps(directory / "metrics.jsonl")
    return Curve(
        recipe=recipe.name,
        seed=seed,
        iterations=[line["step"] for line in found],
        quality=[line[QUALITY] for line in found],
        diversity=[line[DIVERSITY] for line in found],
        flops=recipes.cost(recipe),
        seconds=float(np.median([line["time/step_seconds"] for line in steps[1:]])),
    )


def train(curves: dict[str, Curve], runs: Path, seeds: Sequence[str], parallel: int) -> None:
    """Trains what has no curve yet, and adds its curves, also where it is interrupted.

    Raises:
      SystemExit: a run failed, or the command was told to stop.
    """
    reference = recipes.cost(recipes.REFERENCE)
    jobs: dict[str, tuple[recipes.Recipe, str, runner.Job]] = {}
    for seed in seeds:
        for recipe in all_recipes():
            one = job(runs, recipe, seed, length(recipes.cost(recipe), reference))
            if one.directory.name not in curves:
                jobs[one.directory.name] = (recipe, seed, one)
    try:
        failed = runner.run_jobs([one for *_, one in jobs.values()], parallel)
    finally:
        for name, (recipe, seed, one) in jobs.items():
            if one.finished:
                curves[name] = read_curve(recipe, seed, one.directory)
    if failed:
        sys.exit("Error: these runs failed: " + ", ".join(str(j.directory) for j in failed))


def all_recipes() -> list[recipes.Recipe]:
    """Each without PEC and with it."""
    return [r for plain in recipes.RECIPES for r in (plain, recipes.with_pec(plain))]


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


# From curves to a table.


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
    found: dict[str, list[Curve]] = {recipe.name: [] for recipe in all_recipes()}
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
    """Quality against FLOPs, with the diversity as colour; without PEC and with it."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    shown = None
    for axes, title, with_pec in zip(panels, ("without PEC", "with PEC"), (False, True)):
        rows = {n: s for n, s in found.items() if n.endswith("+ PEC") == with_pec}
        for name, seeds in rows.items():
            points = min(len(curve.quality) for curve in seeds)
            x = np.asarray(seeds[0].iterations[:points]) * seeds[0].flops / 1e12
            y = np.mean([curve.quality[:points] for curve in seeds], axis=0)
            colour = np.mean(
                [np.asarray(c.diversity[:points]) / c.diversity[0] for c in seeds], axis=0
            )
            axes.plot(x, y, color="0.8", lw=0.8, zorder=1)
            shown = axes.scatter(x, y, c=colour, s=14, cmap="viridis", vmin=0, vmax=1, zorder=2)
            axes.annotate(name.removesuffix(" + PEC"), (x[-1], y[-1]), fontsize=6)
        axes.axhline(target, color="0.5", ls="--", lw=1)
        axes.set(title=title, xlabel="TFLOP", ylabel="PickScore, held-out prompts")
        axes.grid(alpha=0.3)
    if shown is not None:
        figure.colorbar(shown, ax=panels, label="entropy of what prompts leave open, of the base's")
    return figure


def main(argv: list[str]) -> None:
    """Trains, keeps, shows."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    runs, out = Path(_RUNS.value).absolute(), Path(_OUT.value).absolute()
    out.mkdir(parents=True, exist_ok=True)
    curves = read_curves(out / "curves.json")
    with exit_on_user_error():
        try:
            if _TRAIN.value:
                train(curves, runs, _SEEDS.value, _JOBS.value)
        finally:
            write_curves(curves, out / "curves.json")
        found = by_recipe(curves.values())
        if recipes.REFERENCE.name not in found:
            sys.exit(f"Error: {out / 'curves.json'} has no run of {recipes.REFERENCE.name!r}.")
        target = target_of(curves.values())
        text = write_table(found, target)
        write_text(out / "table.md", text)
        draw(found, target).savefig(out / "quality.png", dpi=110)
        print(text)


if __name__ == "__main__":
    _RUNS = flags.DEFINE_string("runs", "runs/time_to_quality", "Directory of the run directories.")
    _OUT = flags.DEFINE_string(
        "out", "docs/results/time_to_quality", "Directory of curves and table."
    )
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every recipe.")
    _JOBS = flags.DEFINE_integer("jobs", 2, "Number of runs at the same time.", lower_bound=1)
    _TRAIN = flags.DEFINE_bool(
        "train", True, "Train what is missing; otherwise only table and figure."
    )
    quiet_libraries()
    app.run(main)
