"""Ablations: every combination of `--config.x=a,b,c`, here or on a cluster, then `compare`.

    python launch/sweep.py --config=configs/shapes_pec.py --runs=runs/weights \\
        --config.constraints.pec.weight=0.5,1,2 --config.seed=0,1,2

Finished runs are skipped and interrupted ones resume from their checkpoints, so the same command
can be killed and rerun at any time. `--print` shows one command per job instead, for the queue of
a cluster. A value that itself holds commas goes in brackets or quotes: (0.5,1.0).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: a config with some fields set."""

    directory: Path
    config: Path
    overrides: tuple[tuple[str, str], ...]  # field without "config." -> value as it is typed

    @property
    def command(self) -> list[str]:
        """What starts or resumes it."""
        return [
            sys.executable,
            "-m",
            "pec_jax.main",
            f"--config={self.config}",
            f"--workdir={self.directory}",
            *(f"--config.{field}={value}" for field, value in self.overrides),
        ]

    @property
    def finished(self) -> bool:
        """The final evaluation is the last thing that a run writes."""
        return (self.directory / "eval.json").exists()


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
    config: Path, runs: Path, axes: Mapping[str, Sequence[str]], fixed: Mapping[str, str]
) -> list[Job]:
    """The jobs of all combinations of the axes' values.

    Args:
        config: config file of all runs.
        runs: where their directories lie, named by what varies.
        axes: field -> values; the last varies fastest.
        fixed: field -> value, the same in all runs and not in their names.
    """
    jobs = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        name = "_".join(f"{field}={value}" for field, value in chosen.items()) or "run"
        safe = "".join(c if c.isalnum() or c in "._=-" else "-" for c in name)
        jobs.append(Job(runs / safe, config, tuple({**fixed, **chosen}.items())))
    return jobs


def run_jobs(jobs: Sequence[Job], parallel: int) -> list[Job]:
    """Runs what is not finished, `parallel` at a time, each on its own share of the cores.

    What a job says goes to log.txt in its directory. A failed job does not stop the others.
    Ctrl-C or SIGTERM ends the running ones after their iteration, with a checkpoint.

    Returns:
        The jobs that failed.
    """
    waiting = [job for job in jobs if not job.finished]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them finished before.", flush=True)
    if not waiting:
        return []
    pool, running = _Cores(parallel), _Running()
    failed, start = [], time.monotonic()
    with running.stopped_by_signals(), concurrent.futures.ThreadPoolExecutor(parallel) as threads:
        futures = {threads.submit(_run_job, job, pool, running): job for job in waiting}
        for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            job = futures[future]
            if running.stopping:
                continue
            spent = time.monotonic() - start
            left = spent / done * (len(waiting) - done)
            state = "finished" if future.result() else "FAILED, see its log.txt"
            print(
                f"[{done}/{len(waiting)}] {job.directory.name} {state}; "
                f"{spent / 60:.0f} min so far, about {left / 60:.0f} to go",
                flush=True,
            )
            if not future.result():
                failed.append(job)
    if running.stopping:
        sys.exit("Stopped; the same command resumes from here.")
    return failed


def compare(directories: Sequence[Path], out: Path) -> None:
    """The table, the figures and the report of finished runs."""
    command = [sys.executable, "-m", "pec_jax.compare", f"--out={out}", *map(str, directories)]
    subprocess.run(command, cwd=ROOT, check=True)


class _Cores:
    """Shares of the machine's cores, lent to one job each."""

    def __init__(self, parts: int):
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._shares = [available[i::parts] for i in range(parts)]
        self._lock = threading.Lock()

    def take(self) -> list[int]:
        with self._lock:
            return self._shares.pop()

    def give(self, share: list[int]) -> None:
        with self._lock:
            self._shares.append(share)


class _Running:
    """The processes that run now, so that a signal reaches them."""

    def __init__(self) -> None:
        self.stopping = False
        self._processes: set[subprocess.Popen] = set()

    def add(self, process: subprocess.Popen) -> None:
        self._processes.add(process)
        if self.stopping:
            process.terminate()

    def remove(self, process: subprocess.Popen) -> None:
        self._processes.discard(process)

    def stopped_by_signals(self):
        running = self

        class Handlers:
            def __enter__(self):
                self.previous = {
                    s: signal.signal(s, running._stop) for s in (signal.SIGTERM, signal.SIGINT)
                }

            def __exit__(self, *_):
                for number, handler in self.previous.items():
                    signal.signal(number, handler)

        return Handlers()

    def _stop(self, *_) -> None:
        self.stopping = True
        print("Stopping after the iterations that are under way ...", flush=True)
        for process in list(self._processes):
            process.terminate()


def _run_job(job: Job, pool: _Cores, running: _Running) -> bool:
    if running.stopping:
        return False
    job.directory.mkdir(parents=True, exist_ok=True)
    share = pool.take()

    # All runs of a sweep compile the same few programs: they share them on disk.
    cache = str(job.directory.parent / ".compiled")
    environment = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # many small ones add up
        **os.environ,
    }
    try:
        with (job.directory / "log.txt").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                job.command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is passed on by us, once
            )
            if share:  # before it has started a single thread
                os.sched_setaffinity(process.pid, share)
            running.add(process)
            process.wait()
            running.remove(process)
    finally:
        pool.give(share)
    return process.returncode == 0 and job.finished


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
    """Runs or prints the grid, then compares."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not _CONFIG.value or not Path(_CONFIG.value).is_file():
        sys.exit(f"Error: --config={_CONFIG.value} is not a file, e.g. configs/shapes_pec.py.")
    try:
        axes = {field: split_values(text) for field, text in _overrides.items()}
    except ValueError as error:
        sys.exit(f"Error: {error}")
    runs = Path(_RUNS.value).absolute()
    fixed = {field: values[0] for field, values in axes.items() if len(values) == 1}
    varied = {field: values for field, values in axes.items() if len(values) > 1}
    jobs = grid(Path(_CONFIG.value).absolute(), runs, varied, fixed)
    if _PRINT.value:
        print("\n".join(shlex.join(job.command) for job in jobs))
        return
    failed = run_jobs(jobs, _JOBS.value)
    if failed:
        sys.exit("Error: these runs failed: " + ", ".join(str(job.directory) for job in failed))
    compare([job.directory for job in jobs], runs / "compare")


if __name__ == "__main__":
    _CONFIG = flags.DEFINE_string("config", None, "Config file that all runs share.")
    _RUNS = flags.DEFINE_string("runs", "runs/sweep", "Directory of the run directories.")
    _JOBS = flags.DEFINE_integer("jobs", 1, "Number of runs at the same time.", lower_bound=1)
    _PRINT = flags.DEFINE_bool("print", False, "Print one command per job and run nothing.")
    _arguments, _overrides = take_overrides(sys.argv)
    app.run(main, argv=_arguments)
