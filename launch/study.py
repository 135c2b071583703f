"""The paper's experiments on the embedded model, all of them, with one command:

    python launch/study.py --runs=runs/study --out=docs/results/study

First every method's own parameter is chosen by the same grid of three values, in runs as long as
those of the table, on a seed and on prompts that are not reported; then all rows of the table are
trained for every seed and each reward; then the tables, figures and reports are made. Finished runs
are skipped and interrupted ones resume, so the command can be killed and rerun at any time.
`--quick` is a version of ten minutes: one reward, a few rows, with the parameters that were chosen
before. `--from_archive` starts from the runs that are kept in runs.tar.xz beside the tables, and
trains what is missing there; where nothing is, it takes two minutes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jobs as runner
import study_archive
import study_claims
from absl import app, flags
from PIL import Image

CONFIG = runner.ROOT / "configs" / "shapes_study.py"
TUNED = runner.ROOT / "docs" / "results" / "study" / "tuned.json"
REWARDS = ("pickscore", "pickscore_taste", "attributes")  # each is trained on alone
SEEDS = ("0", "1", "2", "3", "4")
TUNING_SEED, TUNING_REWARD, TUNING_PROMPTS = "100", "pickscore", "shapes/tuning_open"
WEIGHTS = ("3.0", "6.0", "12.0")
TARGETS = ("0.7", "0.8", "0.9")  # at 1 the weight has not settled in 80 iterations


@dataclasses.dataclass(frozen=True)
class Method:
    """A constraint in a space, and the grid of its own parameter; "none" is plain Flow-GRPO."""

    name: str
    space: str = ""  # latent, or an encoder
    field: str = "weight"  # of config.constraints.NAME
    grid: tuple[str, ...] = ()
    extra: tuple[tuple[str, str], ...] = ()
    tag: str = ""  # sets apart what name and space do not

    @property
    def label(self) -> str:
        """Names the method in directories and in tuned.json."""
        parts = (self.name, self.space.replace(" ", ""), self.tag)
        return "-".join(part for part in parts if part)

    def overrides(self, value: str = "") -> dict[str, str]:
        """What its runs set in the config."""
        result = dict(self.extra)
        if self.space == "latent":
            result[f"constraints.{self.name}.space"] = "latent"
        elif self.space:
            result["perception.encoder"] = self.space
        return result | ({f"constraints.{self.name}.{self.field}": value} if value else {})


DUAL = (("constraints.pec_target.weight", "12.0"), ("constraints.pec_target.rate", "4.0"))
ALL = "dino+clip+pickscore"  # the three spaces at once
LIGHT_KL = (("constraints.kl.weight", "0.03"),)
LOSS = ("0.5", "1.5", "4.5")  # weights beside a loss of normalised advantages
METHODS = (
    Method("none"),
    Method("kl", grid=("0.03", "0.1", "0.3")),
    Method("clip_higher", field="ratio", grid=("1.4", "2.8", "5.6")),
    Method("entropy_reg", "latent", grid=LOSS),
    Method("entropy_reg", "pickscore", grid=LOSS),
    Method("clip_cov", "latent", field="share", grid=("0.25", "0.5", "1.0")),
    Method("clip_cov", "pickscore", field="share", grid=("0.25", "0.5", "1.0")),
    Method("kl_cov", "latent", grid=LOSS),
    Method("kl_cov", "pickscore", grid=LOSS),
    Method("pec", "dino", grid=WEIGHTS),
    Method("pcvae", "dino", grid=WEIGHTS),
    Method("pec", "pickscore", grid=WEIGHTS),
    Method("pcvae", "pickscore", grid=WEIGHTS),
    Method("pec", "dino", grid=WEIGHTS, extra=LIGHT_KL, tag="kl"),
    Method("pec_target", ALL, "target", TARGETS, extra=DUAL),
)
# PEC in DINO's space with the other estimators, tuned like the rows; with knn it is one of them.
ESTIMATORS = tuple(
    Method("pec", "dino", grid=WEIGHTS, extra=(("perception.estimator", name),), tag=name)
    for name in ("gaussian", "logdet")
)
# Shorter, evaluated before and after only, on half of the prompts.
QUICK_FIELDS = {"num_iterations": "24", "schedule.eval_every": "24", "eval.num_prompts": "24"}
QUICK, QUICK_SEEDS = ("none", "kl", "pec-dino", "pec-pickscore"), 3
# These are shown in pictures (of the first seed), and measured on the way.
SHOWN = {"none": "grpo", "kl": "kl", "pec-dino": "pec"}
PANELS = (
    ("quality/finish", "quality: finish"),
    ("diversity/attributes", "diversity: entropy of what prompts leave open"),
    ("distance/frechet_dino", "distance from the base model (Fréchet, DINO)"),
)
LONG, LONG_SEEDS = {"num_iterations": "300", "schedule.eval_every": "25"}, 2


def reward_overrides(reward: str) -> dict[str, str]:
    """Trains on one reward; these and those that only judge are measured in the evaluation."""
    weights = {f"rewards.{name}.weight": "1.0" if name == reward else "0.0" for name in REWARDS}
    return weights | {f"rewards.{name}.evaluate": "True" for name in (*REWARDS, "hps", "clip")}


def job(directory: Path, seed: str, reward: str, method: Method, value: str, **more: str):
    """One run."""
    fields = {**reward_overrides(reward), **method.overrides(value), **more, "seed": seed}
    name = "_".join(part for part in (method.label, value, f"seed={seed}") if part)
    return runner.Job(directory / name, CONFIG, tuple(fields.items()))


def tuning_jobs(runs: Path) -> dict[Method, dict[str, runner.Job]]:
    """method -> value -> run, on the tuning seed and the tuning prompts."""
    apart = {"eval.entropy_probes": "0", "prompts.heldout": TUNING_PROMPTS}
    return {
        method: {
            value: job(runs / "tuning", TUNING_SEED, TUNING_REWARD, method, value, **apart)
            for value in method.grid or ("",)
        }
        for method in (*METHODS, *ESTIMATORS)
    }


def choose(runs: Path, out: Path, parallel: int) -> dict[str, list[str]]:
    """Trains the grids and ranks every method's values by the overall score among all of them.

    Returns:
        method label -> its values, the best first; also written to tuned.json with the scores.
    """
    jobs = tuning_jobs(runs)
    flat = [run for values in jobs.values() for run in values.values()]
    run_all(flat, parallel)
    scores = overall([run.directory for run in flat])
    record = {
        method.label: {value: scores[run.directory] for value, run in values.items()}
        for method, values in jobs.items()
        if method.grid
    }
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"field": parameter_fields(), "overall": record}, indent=2)
    (out / "tuned.json").write_text(text + "\n", encoding="utf-8")
    return ranked(record)


def ranked(record: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """method label -> the values of its grid, the best first."""
    return {
        label: sorted(scores, key=lambda value: scores[value], reverse=True)
        for label, scores in record.items()
    }


def chosen_before() -> dict[str, list[str]]:
    """method label -> the values of its grid, the best first, as TUNED has them.

    Where no study has been run since the methods changed, the middle of a grid comes first.
    """
    if TUNED.exists():
        return ranked(json.loads(TUNED.read_text(encoding="utf-8"))["overall"])
    methods = [method for method in (*METHODS, *ESTIMATORS) if method.grid]
    return {method.label: [method.grid[len(method.grid) // 2], *method.grid] for method in methods}


def parameter_fields() -> dict[str, str]:
    """method label -> the field of its constraint that its grid varies."""
    return {method.label: method.field for method in (*METHODS, *ESTIMATORS) if method.grid}


def overall(directories: Sequence[Path]) -> dict[Path, float]:
    """Run directory -> overall score in a table of all of them."""
    from pec_jax.evaluation import run_table, table

    found = run_table.rows_of_runs(run_table.find_runs(directories))
    rows = table.normalise([row for row, _ in found])
    return {
        run.directory: row.mean(table.OVERALL)
        for row, (_, runs) in zip(rows[1:], found[1:])
        for run in runs
    }


def run_all(jobs: Sequence[runner.Job], parallel: int) -> None:
    """Runs what is missing, `parallel` at a time; ends the program if something fails."""
    if failed := runner.run_jobs(jobs, parallel):
        sys.exit("Error: these runs failed: " + ", ".join(str(j.directory) for j in failed))


def reported_jobs(
    directory: Path,
    reward: str,
    methods: Sequence[Method],
    values: dict[str, list[str]],
    seeds: Sequence[str],
    **more: str,
) -> list[runner.Job]:
    """The rows of one table, all seeds; whole rounds of one seed come first."""
    jobs = []
    for seed in seeds:
        for method in methods:
            extra = _shown(seed == seeds[0]) if method.label in SHOWN else {}
            value = values[method.label][0] if method.grid else ""
            jobs.append(job(directory, seed, reward, method, value, **extra | more))
    return jobs


def _shown(pictures: bool) -> dict[str, str]:
    """Evaluations on the way; pictures before the first iteration and after the last."""
    every = {"schedule.eval_every": "10"}
    return every | ({"schedule.sample_every": "1000"} if pictures else {})


def show(jobs: Sequence[runner.Job], out: Path) -> None:
    """Pictures and curves of the methods that are shown: base.png and others, spread.png."""
    from pec_jax.evaluation import figures, run_table, steps

    shown = [one.directory for one in jobs if _label(one) in SHOWN]
    runs = {
        row.label: [steps.read_evaluations(run.directory) for run in found]
        for row, found in run_table.rows_of_runs(run_table.find_runs(shown))[1:]
    }
    out.mkdir(parents=True, exist_ok=True)
    figures.spread_and_distance(runs, PANELS).savefig(out / "spread.png", dpi=110)
    copy_grids(jobs, out)
    for name in ("base", *SHOWN.values()):
        if (out / f"{name}.png").exists():
            first_columns(out / f"{name}.png", out / f"{name}_detail.png")


def first_columns(grid: Path, detail: Path, columns: int = 6) -> None:
    """The left of a sample grid, twice as large: legible where three of them share a page."""
    with Image.open(grid) as sheet:
        cell = 66  # of 64 pixels and a gap, as metric_writer.image_grid has it
        part = sheet.crop((0, 0, columns * cell + 2, sheet.height))
        part.resize((2 * part.width, 2 * part.height), Image.Resampling.LANCZOS).save(detail)


def _label(one: runner.Job) -> str:
    """Of the method: the run's name without its value and its seed."""
    stem = one.directory.name.rpartition("_seed=")[0]
    return next(m.label for m in METHODS if m.label in (stem, stem.rpartition("_")[0]))


def copy_grids(jobs: Sequence[runner.Job], out: Path) -> None:
    """The pictures of the runs that drew some: base.png, and one of each method."""
    for one in jobs:
        grids = sorted((one.directory / "samples").glob("step_*.png"))
        if len(grids) > 1 and _label(one) in SHOWN:
            shutil.copy(grids[0], out / "base.png")
            shutil.copy(grids[-1], out / f"{SHOWN[_label(one)]}.png")


def train_and_compare(
    runs: Path, out: Path, chosen: dict[str, list[str]], seeds: Sequence[str], parallel: int
) -> None:
    """All rows on every reward; and the grids of PEC in DINO's space with each estimator."""
    for reward in REWARDS:
        jobs = reported_jobs(runs / reward, reward, METHODS, chosen, seeds)
        run_all(jobs, parallel)
        runner.compare([one.directory for one in jobs], out / reward)
        show(jobs, out / reward)
    grids = [
        run.directory
        for method, values in tuning_jobs(runs).items()
        if method in ESTIMATORS or method.label in ("none", "pec-dino")
        for run in values.values()
    ]
    runner.compare(grids, out / "estimators")
    train_long(runs / "long", out / "long", chosen, seeds[:LONG_SEEDS], parallel)
    study_claims.write(runs, out, REWARDS)


def train_long(
    runs: Path, out: Path, chosen: dict[str, list[str]], seeds: Sequence[str], parallel: int
) -> None:
    """The methods that are shown, five times as long: what lasts, and what does not."""
    methods = [method for method in METHODS if method.label in SHOWN]
    jobs = reported_jobs(runs, TUNING_REWARD, methods, chosen, seeds, **LONG)
    run_all(jobs, parallel)
    runner.compare([one.directory for one in jobs], out)
    show(jobs, out)


def quick(
    runs: Path, out: Path, chosen: dict[str, list[str]], seeds: Sequence[str], parallel: int
) -> None:
    """A few rows on one reward and a few seeds, a third as long."""
    methods = [method for method in METHODS if method.label in QUICK]
    jobs = reported_jobs(
        runs / TUNING_REWARD, TUNING_REWARD, methods, chosen, seeds[:QUICK_SEEDS], **QUICK_FIELDS
    )
    run_all(jobs, parallel)
    runner.compare([one.directory for one in jobs], out / TUNING_REWARD)
    study_claims.write(runs, out, [TUNING_REWARD])


def check(runs: Path, archive: Path | None = None) -> None:
    """Ends the program if the runs there, or those to be unpacked, are of an earlier version.

    Args:
        runs: where the run directories lie.
        archive: directory of an archive to unpack there first.
    """
    from pec_jax.errors import RunError

    try:
        if archive is not None:
            study_archive.unpack(archive, runs)
        study_archive.check_runs(runs)
    except (RunError, OSError) as error:
        sys.exit(f"Error: {error}")


def main(argv: list[str]) -> None:
    """Tunes, trains, compares."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    runs, out = Path(_RUNS.value).absolute(), Path(_OUT.value).absolute()
    if _QUICK.value:
        check(runs / "quick")
        chosen = chosen_before()
        quick(runs / "quick", runs / "quick" / "results", chosen, _SEEDS.value, _JOBS.value)
        return
    check(runs, archive=out if _FROM_ARCHIVE.value else None)
    chosen = choose(runs, out, _JOBS.value)
    train_and_compare(runs, out, chosen, _SEEDS.value, _JOBS.value)
    study_archive.pack(runs, out)


if __name__ == "__main__":
    _RUNS = flags.DEFINE_string("runs", "runs/study", "Directory of the run directories.")
    _OUT = flags.DEFINE_string("out", "docs/results/study", "Directory of tables and figures.")
    _SEEDS = flags.DEFINE_list("seeds", list(SEEDS), "Seeds that every row is trained on.")
    _JOBS = flags.DEFINE_integer("jobs", 2, "Number of runs at the same time.", lower_bound=1)
    _FROM_ARCHIVE = flags.DEFINE_bool(
        "from_archive", False, "Start from the runs kept in --out/runs.tar.xz."
    )
    _QUICK = flags.DEFINE_bool("quick", False, "Train four rows on one reward: ten minutes.")
    app.run(main)
