"""How much each recipe costs until it is as good as plain Flow-GRPO, and how diverse it is then.

    python benchmarks/time_to_quality.py --runs=runs/time_to_quality \\
        --out=docs/results/time_to_quality

Every recipe of recipes.py, with PEC and without, is trained on the embedded world for as many FLOPs
as ITERATIONS iterations of plain Flow-GRPO, and evaluated on the way. A run is there when its
reward on held-out prompts has risen by nine tenths of what plain Flow-GRPO's rises by in the end
(the mean of its seeds); between two evaluations a straight line is drawn. FLOPs are counted from
the program, seconds are the median iteration's of the runs, --jobs of which share the machine.

The curves are kept in OUT/curves.json, beside table.md and quality.png that are made of them: runs
whose curve is there are not trained again, and an interrupted command goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import jobs as runner  # noqa: E402

from benchmarks import arrivals, recipes  # noqa: E402
from benchmarks.arrivals import Curve  # noqa: E402
from pec_jax.errors import exit_on_user_error, quiet_libraries  # noqa: E402
from pec_jax.evaluation import steps as files  # noqa: E402
from pec_jax.io import write_text  # noqa: E402

CONFIG = ROOT / "configs" / "shapes_study.py"
ITERATIONS = 60  # of the reference, all steps of plain Flow-GRPO
MOST = 120  # iterations of any run
EVALUATIONS = 15  # of a run, the last one included
QUALITY, DIVERSITY = "quality/pickscore", "diversity/attributes"


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
        for recipe in recipes.all_recipes():
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


def main(argv: list[str]) -> None:
    """Trains, keeps, shows."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    runs, out = Path(_RUNS.value).absolute(), Path(_OUT.value).absolute()
    out.mkdir(parents=True, exist_ok=True)
    curves = arrivals.read_curves(out / "curves.json")
    with exit_on_user_error():
        try:
            if _TRAIN.value:
                train(curves, runs, _SEEDS.value, _JOBS.value)
        finally:
            arrivals.write_curves(curves, out / "curves.json")
        found = arrivals.by_recipe(curves.values())
        if recipes.REFERENCE.name not in found:
            sys.exit(f"Error: {out / 'curves.json'} has no run of {recipes.REFERENCE.name!r}.")
        target = arrivals.target_of(curves.values())
        text = arrivals.write_table(found, target)
        write_text(out / "table.md", arrivals.HEADING + text)
        arrivals.draw(found, target).savefig(out / "quality.png", dpi=110)
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
