"""Ablations: every combination of `--config.x=a,b,c`, here or on a cluster, then `compare`.

    python launch/sweep.py --config=configs/shapes_pec.py --runs=runs/weights \\
        --config.constraints.pec.weight=0.5,1,2 --config.seed=0,1,2

All values are checked before anything runs. Finished runs are skipped and interrupted ones resume
from their checkpoints, so the same command can be killed and rerun at any time. `--plan` shows what
is done and what is left; `--print` shows one command per job instead, for the queue of a cluster. A
value that itself holds commas goes in brackets or quotes: (0.5,1.0).
"""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags
from jobs import Job, compare, run_jobs

from pec_jax import io
from pec_jax.config import Config, from_config_dict
from pec_jax.config.changes import binding, since
from pec_jax.config.files import find, load_config
from pec_jax.config.overrides import overridden
from pec_jax.config.user_file import import_plugins
from pec_jax.errors import RunError, exit_on_user_error


def split_values(text: str) -> list[str]:
    """Values between the commas that stand outside of brackets and quotes.

    Raises:
        ValueError: for an empty value, or a bracket or quote that is not closed.
    """
    values, current, closing = [], "", []
    pairs = {"(": ")", "[": "]", "{": "}", "'": "'", '"': '"'}
    for character in text:
        if closing and character == closing[-1]:
            closing.pop()
        elif character in pairs and not (closing and closing[-1] in "'\""):
            closing.append(pairs[character])
        if character == "," and not closing:
            values.append(current)
            current = ""
        else:
            current += character
    values.append(current)
    if closing or not all(value.strip() for value in values):
        raise ValueError(f"{text!r} is not a list of values; write them as a,b,c.")
    return [value.strip() for value in values]


def grid(
    config: Path,
    runs: Path,
    axes: Mapping[str, Sequence[str]],
    fixed: Mapping[str, str],
    plugins: Sequence[str] = (),
) -> list[Job]:
    """The jobs of all combinations of the axes' values.

    Args:
        config: config file of all runs.
        runs: where their directories lie, named by what varies.
        axes: field -> values; the last varies fastest.
        fixed: field -> value, the same in all runs and not in their names.
        plugins: Python files that the runs import first.
    """
    jobs = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        name = "_".join(f"{field}={value}" for field, value in chosen.items()) or "run"
        safe = "".join(c if c.isalnum() or c in "._=-" else "-" for c in name)
        overrides = tuple({**fixed, **chosen}.items())
        jobs.append(Job(runs / safe, config, overrides, tuple(plugins)))
    return jobs


def check(jobs: Sequence[Job]) -> list[Config]:
    """The config of each job.

    Raises:
        UserFileError: the config file or a plugin fails.
        ConfigError: of a job whose config is refused.
        RunError: a directory holds a run of another config.
    """
    import_plugins(jobs[0].plugins)
    shared = load_config(str(jobs[0].config))
    configs = []
    for job in jobs:
        config = from_config_dict(overridden(shared, dict(job.overrides)))
        stored = job.directory / "config.json"
        if stored.exists():
            changes = since(io.read_json(stored), config)
            if fields := binding(changes):
                raise RunError(
                    f"{job.directory} was made with another config:\n  "
                    + "\n  ".join(changes[field] for field in fields)
                    + "\nChoose another --runs."
                )
        configs.append(config)
    return configs


def plan(
    jobs: Sequence[Job], configs: Sequence[Config], axes: Mapping[str, Sequence[str]], parallel: int
) -> str:
    """What there is to do, on one screen: axes, how far each run is, and the time left."""
    done = [_iterations(job.directory) for job in jobs]
    finished = [job.finished for job in jobs]
    begun = [i for i, job in enumerate(jobs) if done[i] and not finished[i]]
    failed = [job for i, job in enumerate(jobs) if not finished[i] and _complaint(job)]
    width = max(map(len, axes), default=0)
    lines = [f"{field:<{width}}  {'  '.join(values)}" for field, values in axes.items()]
    lines.append(
        f"{len(jobs)} runs: {sum(finished)} finished, {len(begun)} begun, "
        f"{len(jobs) - sum(finished) - len(begun)} to start"
    )
    lines += [
        f"  {jobs[i].directory.name}: {done[i]} of {configs[i].num_iterations} iterations"
        for i in begun[:10]
    ]
    lines += [f"  {job.directory.name} ended with {_complaint(job)}" for job in failed[:10]]
    spent = [_seconds(job.directory) / n for job, n in zip(jobs, done) if n]
    if spent and not all(finished):
        left = sum(c.num_iterations - n for c, n, end in zip(configs, done, finished) if not end)
        minutes = left * statistics.median(spent) / parallel / 60
        lines.append(f"about {minutes:.0f} min left, {parallel} at a time")
    return "\n".join(lines)


def _steps(directory: Path) -> list[dict[str, float]]:
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if '"reward/mean"' in line and line.endswith("}")]


def _iterations(directory: Path) -> int:
    return int(max((step["step"] for step in _steps(directory)), default=0))


def _seconds(directory: Path) -> float:
    """Of its iterations, with what is done between them."""
    return sum(step["time/step_seconds"] for step in _steps(directory))


def _complaint(job: Job) -> str:
    """The error that a run's log ends with, in one line; empty if there is none."""
    log = job.directory / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if line and not line.startswith(" ")), "")
    return last[:100] if "Error" in last.partition(":")[0] else ""


def take_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Splits `--config.a.b=v` (or `--config.a.b v`) from the other arguments.

    Returns:
        The other arguments, and field -> text.
    """
    rest, overrides, arguments = [], {}, iter(argv)
    for argument in arguments:
        if argument.lstrip("-").startswith("config.") and argument.startswith("-"):
            field, equals, value = argument.lstrip("-").removeprefix("config.").partition("=")
            overrides[field] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return rest, overrides


def main(argv: list[str]) -> None:
    """Checks, then shows, prints or runs the grid, and compares."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not _CONFIG.value:
        raise app.UsageError("--config is missing, e.g. --config=configs/shapes_pec.py.")
    with exit_on_user_error():
        axes = {field: split_values(text) for field, text in _overrides.items()}
        fixed = {field: values[0] for field, values in axes.items() if len(values) == 1}
        varied = {field: values for field, values in axes.items() if len(values) > 1}
        runs = Path(_RUNS.value).absolute()
        plugins = [str(Path(plugin).expanduser().absolute()) for plugin in _PLUGIN.value]
        jobs = grid(find(_CONFIG.value).absolute(), runs, varied, fixed, plugins)
        configs = check(jobs)
    if _PRINT.value:
        print("\n".join(shlex.join(job.command) for job in jobs))
        return
    print(plan(jobs, configs, varied, _JOBS.value), flush=True)
    if _PLAN.value:
        return
    failed = run_jobs(jobs, _JOBS.value)
    if failed:
        sys.exit("Error: these runs failed: " + ", ".join(str(job.directory) for job in failed))
    compare([job.directory for job in jobs], runs / "compare")


if __name__ == "__main__":
    _CONFIG = flags.DEFINE_string(
        "config", None, "Config that all runs share: a file, or the name of a shipped one."
    )
    _PLUGIN = flags.DEFINE_multi_string("plugin", [], "Python file that the runs import first.")
    _RUNS = flags.DEFINE_string("runs", "runs/sweep", "Directory of the run directories.")
    _JOBS = flags.DEFINE_integer("jobs", 1, "Number of runs at the same time.", lower_bound=1)
    _PRINT = flags.DEFINE_bool("print", False, "Print one command per job and run nothing.")
    _PLAN = flags.DEFINE_bool("plan", False, "Show what is done and what is left, and run nothing.")
    _arguments, _overrides = take_overrides(sys.argv)
    app.run(main, argv=_arguments)
