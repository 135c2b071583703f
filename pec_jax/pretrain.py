"""Trains the embedded model from nothing: `python -m pec_jax.pretrain --out=DIR`.

One command makes the whole shapes pipeline: a Stable Diffusion 3 directory in diffusers' layout
and the five encoders beside it, in at most three hours on two cores. Finished stages are skipped,
an interrupted stage resumes from its last snapshot, and the seed decides everything random.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from pec_jax import command_line
from pec_jax.errors import exit_on_user_error

if TYPE_CHECKING:
    from pec_jax.shapes.pretraining.loop import Session

PREFERENCES = ("pickscore", "pickscore_taste", "hps")
STAGES = ("skeleton", "vae", "clip", "t5", "transformer", "dino", *PREFERENCES, "report")

_OUT = command_line.required_string("out", "Directory of the pipeline to make.")
_STAGES = flags.DEFINE_list("stages", list(STAGES), f"Stages to run, of {', '.join(STAGES)}.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.")
_SCALE = flags.DEFINE_float(
    "steps_scale", 1.0, "Factor of every stage's number of steps.", lower_bound=0.0
)
_STATE = flags.DEFINE_string(
    "state", None, "Directory for snapshots, logs and numbers; OUT with '.state' behind by default."
)

flags.register_validator(
    "stages",
    lambda stages: set(stages) <= set(STAGES),
    message=f"--stages may name {', '.join(STAGES)}.",
)


def main(argv: list[str]) -> None:
    """Parses, runs the stages that are not done yet."""
    command_line.refuse_arguments(argv)
    from pec_jax.shapes.pretraining.loop import Session

    with exit_on_user_error():
        out = Path(_OUT.value)
        state = Path(_STATE.value) if _STATE.value else out.with_name(out.name + ".state")
        session = Session(out, state, seed=_SEED.value, steps_scale=_SCALE.value)
        for stage in (stage for stage in STAGES if stage in _STAGES.value):
            if session.numbers(stage) is not None:
                print(f"{stage}: done before, see {session.numbers_path(stage)}")
                continue
            start = time.monotonic()
            numbers = _run(stage, session)
            session.finish(stage, numbers | {"seconds": round(time.monotonic() - start, 1)})
            print(f"{stage}: {numbers}", flush=True)


def _run(stage: str, session: Session) -> dict[str, Any]:
    package = "pec_jax.shapes.pretraining"
    if stage in PREFERENCES:
        return importlib.import_module(f"{package}.preferences").run(session, stage)
    return importlib.import_module(f"{package}.{stage}").run(session)


if __name__ == "__main__":
    command_line.run(main)
