"""The command that writes a small random pipeline."""

from __future__ import annotations

import json
import subprocess
import sys


def test_command(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "pec_jax.tiny", *arguments], capture_output=True, text=True
        )

    out = tmp_path / "model"
    done = run("--family=flux", f"--out={out}", '--transformer={"num_layers": 1}')
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "transformer" / "config.json").read_text())["num_layers"] == 1
    again = run("--family=flux", f"--out={out}")
    assert again.returncode == 2 and "exists" in again.stderr and "Traceback" not in again.stderr
    unknown = run("--family=flix", f"--out={tmp_path / 'other'}")
    assert unknown.returncode == 2 and "flux, sd3" in unknown.stderr
