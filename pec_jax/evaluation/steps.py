"""The training curves of a run, as its metrics.jsonl has them."""

from __future__ import annotations

import json
from pathlib import Path


def read_steps(path: Path) -> list[dict[str, float]]:
    """The training lines of a `metrics.jsonl`, in order; evaluations are left out.

    Numbers that were not finite, which JSON cannot hold, come back as such.
    """
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "reward/mean" in values:
            steps.append({name: float(value) for name, value in values.items()})
    return steps
