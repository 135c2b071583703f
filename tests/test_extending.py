"""The files that docs/extending.md shows are complete: they load, train, agree with witnesses."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_documented_files_run(tmp_path):
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL))
    assert list(files) == ["judge.py", "palette.py", "capped.py", "truncated.py"]
    for name, source in files.items():
        (tmp_path / name).write_text(source)
    program = Path(__file__).with_name("extending_program.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    metrics = found["metrics"]
    assert {"reward/judge", "constraint/capped/share", "policy/loss"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert math.isclose(metrics["constraint/capped/weight"], 0.1, rel_tol=1e-6)
    assert found["label"] == ["Truncated PG + Capped PEC", "dino + 0.5 * palette", "0.1"]
