"""A judge on the host that goes wrong when the environment says so; a plugin of `faults.py`.

FAULT_KIND says how, FAULT_CALL at which call.
"""

from __future__ import annotations

import os
import time

import numpy as np

from pec_jax.rewards import register
from pec_jax.rewards.host import host_reward

_calls = 0


@register("faulty")
def make(options, networks):
    """Depends on the image alone, unless it fails."""

    def judge(images, prompts):
        global _calls
        _calls += 1
        scores = images.mean((1, 2, 3)) / 255
        if str(_calls) != os.environ.get("FAULT_CALL"):
            return scores
        kind = os.environ["FAULT_KIND"]
        if kind == "raises":
            raise LookupError("no such key")
        if kind == "exits":
            raise SystemExit(3)
        if kind == "hangs":
            time.sleep(3600)
        return {
            "nan": np.full_like(scores, np.nan),
            "infinite": np.full_like(scores, np.inf),
            "too few": scores[:-1],
            "words": ["good"] * len(scores),
            "nothing": None,
        }[kind]

    return host_reward("faulty", judge, timeout=5)
