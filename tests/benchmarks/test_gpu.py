"""The GPU's benchmark, on a CPU at the embedded model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_command_measures_both_libraries(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHON": sys.executable,
        "CONFIG": "configs/shapes_pec.py",
        "RUNS": "1",
        "LIMIT": "1200",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["benchmarks/gpu.sh", tmp_path / "out", "--config.updates.minibatches=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ours, theirs = (json.loads((tmp_path / f"out/{n}.json").read_text()) for n in ("ours", "torch"))
    assert set(ours["rows"]) == {"rollout", "decode", "score", "entropy", "update", "step"}
    assert set(theirs["rows"]) == {"step", "torch, eager", "torch, blocks"}
    assert ours["images"] == theirs["images"] == 8 and ours["runs"] == 1
    assert set(theirs["torch_over_ours"]) == {"torch, eager", "torch, blocks"}
    for part in ("ours", "torch"):
        assert "| step " in (tmp_path / f"out/{part}.txt").read_text()
