"""Training is what it was: metrics and parameters against recordings of an earlier version.

`goldens.json` holds three iterations of each run, recorded at the commit `recorded_at` by

    EXHAUSTIVE=1 python -m tests.goldens.test_goldens

On the CPU and with the jaxlib of the recording, numbers and the parameters' checksum are equal bit
for bit; elsewhere XLA fuses otherwise, and the first iteration's metrics agree to rounding. Sums
depend on how many threads share them, so the runs have one core each.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import jaxlib
import numpy as np
import pytest

from pec_jax.families.tiny import write_pipeline
from pec_jax.training import trainer
from tests.conftest import EXHAUSTIVE, ROOT

FILE = Path(__file__).with_name("goldens.json")
GOLDENS = json.loads(FILE.read_text())
EVAL = {
    "num_iterations": 3,
    "optimizer.learning_rate": 2e-3,
    "eval.num_prompts": 2,
    "eval.groups": 2,
    "eval.images_per_prompt": 4,
    "eval.num_steps": 2,
    "eval.entropy_probes": 0,
    "eval.sample_rows": 1,
    "eval.sample_columns": 1,
    "schedule.sample_every": 0,
    "schedule.checkpoint_every": 0,
}
TINY = {
    "model.height": 32,
    "model.width": 32,
    "batch.groups": 2,
    "batch.group_size": 4,
    "updates.minibatches": 2,
    "sampler.num_steps": 4,
    "perception.k": 1,
    "trainable.rank": 4,
}
PEC = {"constraints.pec.weight": 1.5, "constraints.pec.unit": "reward_std"}
RUNS = {
    "shapes_grpo": {},
    "shapes_pec": {},
    "shapes_grpo_kl": {},
    "sd3_none": {},
    "flux_none": {},
    "sd3_pec": PEC,
    "flux_pec": PEC,
    "flux_kl": {"constraints.kl.weight": 0.1},
    "sd3_kl": {
        "constraints.kl.weight": 0.1,
        "constraints.kl.form": "flow_grpo",
        "updates.epochs": 2,
    },
    "sd3_cfg": {
        "sampler.guidance": 3.5,
        "batch.update_images": 1,
        "batch.rollout_images": 2,
        "batch.decode_images": 2,
    },
    "sd3_clip_higher": {"constraints.clip_higher.ratio": 1.4},
    "sd3_entropy_reg": {
        "constraints.entropy_reg.weight": 0.1,
        "constraints.entropy_reg.space": "latent",
    },
    "sd3_clip_cov": {"constraints.clip_cov.share": 0.2},
    "sd3_kl_cov": {"constraints.kl_cov.weight": 0.1},
    "sd3_pcvae": {"constraints.pcvae.weight": 0.1, "perception.at": "steps"},
    "sd3_pcvae_loss": {"constraints.pcvae.weight": 0.1, "constraints.pcvae.kl_as": "loss"},
    "sd3_pec_target": {
        "constraints.pec_target.target": 0.9,
        "constraints.pec_target.weight": 0.5,
        "constraints.pec_target.base_batches": 2,
        "perception.encoder": "dino + 0.5 * clip",
    },
    "sd3_full_bf16": {
        "trainable.mode": "full",
        "model.dtype": "bfloat16",
        "sampler.storage_dtype": "bfloat16",
        "optimizer.learning_rate": 1e-4,
    },
}
# Elsewhere than where they were recorded: fp32 sums in another order, amplified by the division by
# a group's std; 8-bit images may flip a level.
ELSEWHERE = {"rtol": 2e-3, "atol": 1e-5}


def cpu() -> str:
    """What XLA compiles for here: a hash of the CPU's flags."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line + "\n" for line in lines if line.startswith("flags")), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]


def same_machine() -> bool:
    """Whether XLA compiles here as it did where the goldens were recorded."""
    return (jaxlib.__version__, cpu()) == (GOLDENS["jaxlib"], GOLDENS["cpu"])


def config_of(name, tiny):
    """The ConfigDict of a run."""
    from configs import shapes_grpo, shapes_grpo_kl, shapes_pec

    family = name.partition("_")[0]
    modules = {"shapes_grpo_kl": shapes_grpo_kl, "shapes_pec": shapes_pec}
    config = modules.get(name, shapes_grpo).get_config()
    fields = EVAL | RUNS[name]
    if family in tiny:
        fields |= TINY | RUNS[name] | {"model.path": tiny[family]}
    config.update_from_flattened_dict(fields)
    return config


# All of them with EXHAUSTIVE=1; these cover both families and the configs that are shipped.
CHOSEN = ("shapes_grpo", "shapes_pec", "shapes_grpo_kl", "sd3_none", "flux_none", "sd3_pec_target")
NAMES = sorted(RUNS if EXHAUSTIVE else CHOSEN)


def train_all(directory):
    """The runs, each in a directory of its name; called in a process of its own."""
    models = {f: str(write_pipeline(Path(directory, f), f)) for f in ("sd3", "flux")}
    for name in NAMES:
        trainer.train(config_of(name, models), Path(directory, name))


def run_apart(directory) -> None:
    """`train_all` in a process that has one core."""
    # Without xdist's variables: `tests.conftest` would take a worker's share of the cores.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    code = f"import tests.goldens.test_goldens as goldens; goldens.train_all({str(directory)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def steps_of(run: Path) -> list[dict[str, float]]:
    """What a run logged in every iteration."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "reward/mean" in row]


def checksum(run: Path) -> int:
    """Of the parameters, and of their average, after the last iteration."""
    sums = json.loads(next((run / "checkpoints").glob("3/checksums/*")).read_text())
    kept = {k: v for k, v in sums.items() if k.startswith((".params", ".ema"))}
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


def record() -> None:
    """Writes goldens.json, whole."""
    if not EXHAUSTIVE:
        sys.exit("Error: EXHAUSTIVE=1 is missing: the file would hold a part of the runs.")
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        run_apart(directory)
        runs = {
            name: {"steps": steps_of(run), "parameters": checksum(run)}
            for name, run in ((name, Path(directory, name)) for name in NAMES)
        }
    machine = {"recorded_at": head.stdout.strip(), "jaxlib": jaxlib.__version__, "cpu": cpu()}
    FILE.write_text(json.dumps(machine | {"runs": runs}, indent=1) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of the finished runs."""
    directory = tmp_path_factory.mktemp("goldens")
    run_apart(directory)
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_training_is_what_it_was(name, trained):
    recorded = GOLDENS["runs"][name]
    exact = same_machine()
    for before, now in zip(recorded["steps"], steps_of(trained / name), strict=True):
        for metric, value in before.items():
            if metric.startswith("time/") or (metric == "policy/logp_drift" and not exact):
                continue
            if exact:
                assert now[metric] == value, (metric, before["step"])
            elif before["step"] == 1:
                np.testing.assert_allclose(now[metric], value, **ELSEWHERE, err_msg=metric)
    if exact:
        assert checksum(trained / name) == recorded["parameters"]


if __name__ == "__main__":
    record()
