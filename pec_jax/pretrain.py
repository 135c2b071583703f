"""Trains the embedded model from nothing: `python -m pec_jax.pretrain --out=DIR`.

One command makes the whole shapes pipeline: a Stable Diffusion 3 directory in diffusers' layout
and the five encoders beside it, in at most three hours on two cores. Finished stages are skipped,
an interrupted stage resumes from its last snapshot, and the seed decides everything random.

Stages that do not need each other run side by side, each on one core: networks as small as these
take but 1.5 times as long on one core as on two.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from pec_jax import command_line
from pec_jax.errors import exit_on_user_error

if TYPE_CHECKING:
    from pec_jax.shapes.pretraining.loop import Session

PREFERENCES = ("pickscore", "pickscore_taste", "hps")
NEEDS = {  # what must be there before a stage can start; the first that can start does
    "skeleton": (),
    "vae": ("skeleton",),
    "clip": ("skeleton",),
    "t5": ("skeleton",),
    "transformer": ("vae", "clip", "t5"),
    "dino": ("skeleton",),
    "pickscore": ("clip",),
    "pickscore_taste": ("clip",),
    "hps": ("skeleton",),
    "report": ("transformer", "dino", *PREFERENCES),
}
STAGES = tuple(NEEDS)
SLOT = "PEC_JAX_PRETRAIN_SLOT"  # of a stage run beside others: its core, and its bar's line

_OUT = command_line.required_string("out", "Directory of the pipeline to make.")
_STAGES = flags.DEFINE_list("stages", list(STAGES), f"Stages to run, of {', '.join(STAGES)}.")
_SEED = command_line.define_seed("Seed of everything random.")
_SCALE = flags.DEFINE_float(
    "steps_scale", 1.0, "Factor of every stage's number of steps.", lower_bound=0.0
)
_STATE = flags.DEFINE_string(
    "state", None, "Directory for snapshots, logs and numbers; OUT with '.state' behind by default."
)
_JOBS = flags.DEFINE_integer("jobs", 2, "Number of stages at the same time.", lower_bound=1)

flags.register_validator(
    "stages",
    lambda stages: set(stages) <= set(STAGES),
    message=f"--stages may name {', '.join(STAGES)}.",
)


def main(argv: list[str]) -> None:
    """Parses, runs the stages that are not done yet."""
    command_line.refuse_arguments(argv)
    _pin()
    from pec_jax.shapes.pretraining.loop import Session

    with exit_on_user_error():
        out = Path(_OUT.value)
        state = Path(_STATE.value) if _STATE.value else out.with_name(out.name + ".state")
        session = Session(out, state, seed=_SEED.value, steps_scale=_SCALE.value)
        missing = []
        for stage in (stage for stage in STAGES if stage in _STAGES.value):
            if session.numbers(stage) is not None:
                print(f"{stage}: done before, see {session.numbers_path(stage)}")
            else:
                missing.append(stage)
        if min(_JOBS.value, len(missing)) > 1:
            sys.exit(_side_by_side(missing, session, _JOBS.value))
        for stage in missing:
            _run(stage, session)


def _run(stage: str, session: Session) -> None:
    start = time.monotonic() - session.earlier_seconds(stage)
    package = "pec_jax.shapes.pretraining"
    numbers: dict[str, Any]
    if stage in PREFERENCES:
        numbers = importlib.import_module(f"{package}.preferences").run(session, stage)
    else:
        numbers = importlib.import_module(f"{package}.{stage}").run(session)
    session.finish(stage, numbers | {"seconds": round(time.monotonic() - start, 1)})
    print(f"{stage}: {numbers}", flush=True)


def _side_by_side(stages: list[str], session: Session, jobs: int) -> int:
    """Runs every stage as a process on a core of its own, as soon as what it needs is there.

    After a failure nothing else starts, and what runs is left to finish.

    Returns:
        The first failure's exit status, or 0.
    """
    waiting, free, status = list(stages), list(range(jobs)), 0
    running: dict[futures.Future[int], tuple[str, int]] = {}
    with futures.ThreadPoolExecutor(jobs) as pool:
        while running or (waiting and not status):
            unfinished = {*waiting, *(stage for stage, _ in running.values())}
            ready = [stage for stage in waiting if not unfinished.intersection(NEEDS[stage])]
            for stage in [] if status else ready[: len(free)]:
                waiting.remove(stage)
                slot = free.pop(0)
                running[pool.submit(_process, stage, session, slot)] = stage, slot
            for one in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                stage, slot = running.pop(one)
                free.append(slot)
                if one.result():
                    print(f"Error: stage {stage} failed, see above.", file=sys.stderr, flush=True)
                status = status or one.result()
    return status


def _process(stage: str, session: Session, slot: int) -> int:
    """One stage in a process; its exit status."""
    command = [sys.executable, "-m", "pec_jax.pretrain", f"--stages={stage}", "--jobs=1"]
    command += [f"--out={session.out}", f"--state={session.state}", f"--seed={session.seed}"]
    command += [f"--steps_scale={session.steps_scale}"]
    return subprocess.call(command, env=os.environ | {SLOT: str(slot)})


def _pin() -> None:
    """Takes the core of this process's slot; XLA then makes one thread. Before JAX is imported."""
    if SLOT in os.environ and hasattr(os, "sched_setaffinity"):  # elsewhere they share all cores
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ[SLOT]) % len(cores)]})


if __name__ == "__main__":
    command_line.run(main)
