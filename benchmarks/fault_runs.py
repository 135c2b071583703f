"""Small runs as processes, for `faults.py`: started, ended, and compared with one left alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = Path(__file__).with_name("faulty_reward.py")
LENGTH, HALF = 8, 4  # iterations of a run, and of one that is stopped halfway
BOUND_SECONDS = 300.0  # within which a process has to end by itself
SETTINGS = {
    "trainable.rank": 4,
    "sampler.num_steps": 3,
    "batch.groups": 2,
    "batch.group_size": 4,
    "updates.minibatches": 1,
    "eval.num_prompts": 2,
    "eval.groups": 2,
    "eval.images_per_prompt": 4,
    "eval.num_steps": 3,
    "eval.sample_rows": 2,
    "eval.sample_columns": 2,
    "schedule.log_every": 1,
    "schedule.eval_every": 3,
    "schedule.sample_every": 3,
    "schedule.checkpoint_every": 2,
    "schedule.keep_checkpoints": 2,
}
Numbers = Mapping[str, object]
JUDGED = ("--config.rewards.faulty.weight=1.0", "--config.rewards.pickscore.weight=0.0")


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that is no more.

    Attributes:
        code: exit status, negative for a signal; None if it had to be killed for taking too long.
        output: what it printed.
        seconds: from the moment it was waited for.
    """

    code: int | None
    output: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The sentences for a person."""
        return [line for line in self.output.splitlines() if line.startswith("Error: ")]

    @property
    def is_sentence(self) -> bool:
        """Status 2 and one sentence, without a stack trace."""
        return self.code == 2 and len(self.errors) == 1 and not self.has_trace

    @property
    def has_trace(self) -> bool:
        """Whether it printed a stack trace, of Python or of native code."""
        return "Traceback (most recent" in self.output or "*** SIG" in self.output

    @property
    def phase(self) -> str:
        """How far it came."""
        marks = {
            "Held-out evaluation": "at the end",
            f" of {LENGTH}: ": "training",
            "Samples:": "training",
            "Compiling the train step": "compiling",
            "Resuming after": "resuming",
        }
        return next((phase for text, phase in marks.items() if text in self.output), "starting")


class Process:
    """A run's process; what it prints goes to a file."""

    _numbers = itertools.count()

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self._log = log.with_name(f"{log.name}.{next(self._numbers)}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as file:
            self.popen = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **environment}
            )

    @property
    def output(self) -> str:
        """Printed so far."""
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = BOUND_SECONDS) -> Ended:
        """Until it ends, at most so long; then it is killed."""
        begun = time.monotonic()
        try:
            code: int | None = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            code = None
        return Ended(code, self.output, time.monotonic() - begun)


class Lab:
    """Where runs are hurt: a scratch directory with runs that were left alone."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self._lock = threading.Lock()
        self._references: dict[tuple[int, bool], Path] = {}
        scratch.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        workdir: Path,
        *,
        length: int = LENGTH,
        judged: bool = False,
        environment: Mapping[str, str] = {},
        joined: Sequence[str] = (),
    ) -> Process:
        """Starts or resumes a run.

        Args:
            workdir: its directory.
            length: iterations.
            judged: by the plugin's reward.
            environment: in addition to this process's.
            joined: flags of one of several processes.
        """
        fields = {**SETTINGS, "num_iterations": length}
        command = [
            sys.executable,
            "-m",
            "pec_jax.main",
            "--config=configs/shapes_grpo.py",
            f"--workdir={workdir}",
            "--log=jsonl",
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *joined,
        ]
        if judged:
            command += [f"--plugin={PLUGIN}", *JUDGED]
        common = {
            "JAX_PLATFORMS": "cpu",
            "PEC_JAX_CACHE": str(self.scratch / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled"),
        }
        log = self.scratch / "logs" / "_".join(workdir.relative_to(self.scratch).parts)
        return Process(command, log, {**common, **environment})

    def start_several(self, workdir: Path, count: int) -> list[Process]:
        """`count` processes of one device each, which train together."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        alike = [
            "--config.mesh.data=1",
            "--config.mesh.fsdp=-1",
            f"--config.batch.groups={count}",
            f"--config.eval.num_prompts={count}",
            f"--config.eval.groups={count}",
            "--distributed",
            f"--coordinator=localhost:{port}",
            f"--num_processes={count}",
        ]
        return [
            self.start(
                workdir,
                environment={"JAX_NUM_CPU_DEVICES": "1", "NPROC": "2"},
                joined=[*alike, f"--process_id={i}"],
            )
            for i in range(count)
        ]

    def reference(self, *, count: int = 1, judged: bool = False) -> Path:
        """A run that was left alone, made the first time that it is asked for."""
        with self._lock:
            if (count, judged) not in self._references:
                path = self.scratch / f"alone_{count}{'_judged' if judged else ''}"
                if not (path / "eval.json").exists():
                    shutil.rmtree(path, ignore_errors=True)
                    started = (
                        self.start_several(path, count)
                        if count > 1
                        else [self.start(path, judged=judged)]
                    )
                    _check(started)
                self._references[count, judged] = path
            return self._references[count, judged]

    def halfway(self, workdir: Path) -> None:
        """Makes a directory that of a run which has come to HALF of its iterations."""
        half = self.scratch / "half"
        with self._lock:
            if not (half / "eval.json").exists():
                shutil.rmtree(half, ignore_errors=True)
                _check([self.start(half, length=HALF)])
        shutil.copytree(half, workdir)


def _check(processes: Sequence[Process]) -> None:
    for process in processes:
        if (ended := process.wait()).code != 0:
            raise RuntimeError(f"a run that was left alone failed:\n{ended.output[-3000:]}")


_reading = threading.Lock()  # orbax is not made for several threads


def difference(workdir: Path, alone: Path, *, metrics: bool = True, judge: str = "") -> str:
    """In what a finished run differs from one that was left alone; '' if in nothing.

    Every iteration is in the metrics once, every number of the last state and of the final
    evaluation is the same, bit for bit.

    Args:
        workdir: of the run.
        alone: of the other.
        metrics: whether the lines are compared, too.
        judge: a reward that may have failed in an evaluation, which then has its failures in the
            place of its numbers.
    """
    try:
        if metrics and not _alike(_lines(workdir), _lines(alone), judge):
            return f"metrics.jsonl: steps {[line['step'] for line in _lines(workdir)]}"
        with _reading:
            found, expected = _state(workdir), _state(alone)
        if found.keys() != expected.keys():
            return "other arrays"
        for name, value in expected.items():
            if found[name].tobytes() != value.tobytes():
                return f"{name} differs"
        ours, theirs = (json.loads((w / "eval.json").read_text()) for w in (workdir, alone))
        ours, theirs = (_excused(values, judge, of=ours) for values in (ours, theirs))
        names = theirs.keys() if metrics else [n for n in theirs if not n.startswith("fit/")]
        different = [name for name in names if ours.get(name) != theirs[name]]
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return f"eval.json: {different[0]}" if different else ""


def _lines(workdir: Path) -> list[Numbers]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def _alike(ours: Sequence[Numbers], theirs: Sequence[Numbers], judge: str) -> bool:
    return len(ours) == len(theirs) and all(
        _excused(a, judge, of=a) == _excused(b, judge, of=a) for a, b in zip(ours, theirs)
    )


def _excused(values: Numbers, judge: str, *, of: Numbers) -> Numbers:
    """Without what a judge said, if it failed where the numbers `of` were made."""
    if not any(name.endswith(f"failures/{judge}") for name in of):
        return values
    return {name: value for name, value in values.items() if judge not in name}


def _state(workdir: Path) -> dict[str, np.ndarray]:
    """All numbers of the last checkpoint, by name."""
    import jax
    import orbax.checkpoint as ocp

    path = (workdir / "checkpoints" / str(LENGTH) / "state").absolute()
    checkpointer = ocp.PyTreeCheckpointer()
    # As NumPy, wherever it was: runs of several processes have other devices than this one.
    kinds = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        checkpointer.metadata(path).item_metadata.tree,
    )
    tree = checkpointer.restore(path, restore_args=kinds)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
