"""Runs as processes: several at a time, each on its own cores, skipped where they are finished."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: a config with some fields set."""

    directory: Path
    config: Path
    overrides: tuple[tuple[str, str], ...]  # field without "config." -> value as it is typed
    plugins: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """What starts or resumes it."""
        return [
            sys.executable,
            "-m",
            "pec_jax.main",
            *(f"--plugin={plugin}" for plugin in self.plugins),
            f"--config={self.config}",
            f"--workdir={self.directory}",
            *(f"--config.{field}={value}" for field, value in self.overrides),
        ]

    @property
    def finished(self) -> bool:
        """The final evaluation is the last thing that a run writes; of a longer run, it is none."""
        try:
            found = json.loads((self.directory / "eval.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return bool(found["iterations"] >= int(dict(self.overrides).get("num_iterations", 0)))


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
