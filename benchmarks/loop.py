"""Whether the host holds the device up: `python benchmarks/loop.py --config=configs/shapes_pec.py`.

In turns: the bare train step, called again and again, and `train` with everything on: metrics
written after every iteration, a checkpoint after every fifth, sample grids after every tenth, an
evaluation after every twentieth, in a new run directory. The iterations of `train` are told apart
by what came just before them, for the device itself computes samples and evaluations. Prints a
table and, as its last line, one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import config_flags

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the configs, and for this directory by its name

from benchmarks import contestants, setups, timing  # noqa: E402
from pec_jax.config.schema import from_config_dict  # noqa: E402
from pec_jax.errors import exit_on_user_error, quiet_libraries  # noqa: E402
from pec_jax.training import trainer  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file to time.")
_TURNS = flags.DEFINE_integer("turns", 3, "Turns of both.", lower_bound=1)
_ITERATIONS = flags.DEFINE_integer("iterations", 40, "Of either in a turn.", lower_bound=21)

SCHEDULE = {"log_every": 1, "checkpoint_every": 5, "sample_every": 10, "eval_every": 20}
BARE = "bare step"
ALL, AFTER_LOG = "all iterations", "after an iteration that only logged"
AFTER_CHECKPOINT = "after a checkpoint"


def measured(config_dict: object, setup: setups.Setup) -> dict[str, list[float]]:
    """Seconds of each iteration, by where it was timed."""
    step = contestants.whole_step(setup).run
    found: dict[str, list[float]] = {BARE: [], ALL: [], AFTER_LOG: [], AFTER_CHECKPOINT: []}
    for turn in range(_TURNS.value):
        found[BARE] += [_seconds(step) for _ in range(_ITERATIONS.value)]
        with tempfile.TemporaryDirectory() as workdir:
            trainer.train(config_dict, workdir)
            for number, seconds in _iterations(Path(workdir) / "metrics.jsonl"):
                found[ALL].append(seconds)
                if kind := kind_of(number):
                    found[kind].append(seconds)
        print(f"turn {turn + 1} of {_TURNS.value} done", file=sys.stderr, flush=True)
    return found


def kind_of(number: int) -> str:
    """What the host did just before an iteration; "" where the device had other work, too."""
    before = [name for name, every in SCHEDULE.items() if (number - 1) % every == 0]
    kinds = {("log_every",): AFTER_LOG, ("log_every", "checkpoint_every"): AFTER_CHECKPOINT}
    return kinds.get(tuple(before), "")


def _seconds(step: timing.Contestant) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _iterations(metrics: Path) -> Iterator[tuple[int, float]]:
    """(number, seconds) of a run's iterations, but for the first, which compiles."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values["step"] > 1 and "time/step_seconds" in values:
            yield values["step"], values["time/step_seconds"]


def main(argv: list[str]) -> None:
    """Measures and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not _CONFIG.value:
        raise app.UsageError("--config is missing; see --help.")
    config_dict = _CONFIG.value
    config_dict.num_iterations = _ITERATIONS.value
    config_dict.schedule.update(SCHEDULE)
    # Small evaluations: what they compute is the device's work, and not asked here.
    config_dict.eval.update({"num_prompts": config_dict.eval.groups, "entropy_probes": 0})
    with exit_on_user_error():
        found = measured(config_dict, setups.loaded(from_config_dict(config_dict)))
    bare = np.median(found[BARE])
    result = {
        name: {**timing.summary(seconds), "count": len(seconds), "ratio": np.median(seconds) / bare}
        for name, seconds in found.items()
    }
    for name, row in result.items():
        print(f"{name:42} {row['count']:4} {row['median_s']:8.4f} s {row['ratio']:7.3f} of it")
    print(json.dumps(result))


if __name__ == "__main__":
    quiet_libraries()
    app.run(main)
