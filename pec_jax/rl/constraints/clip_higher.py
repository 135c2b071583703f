"""Clip-Higher: good samples of low probability may rise further."""

from __future__ import annotations

import dataclasses

from pec_jax.config.fields import field
from pec_jax.rl.constraint import Constraint, register


@dataclasses.dataclass(frozen=True)
class ClipHigherOptions:
    """DAPO has .28 against .2, a ratio of 1.4."""

    ratio: float = field("e_high over the objective's own; 1 is off.", 1.0, low=1.0)


def raise_upper_bound(options: ClipHigherOptions, low: float, high: float) -> tuple[float, float]:
    """(e_low, ratio e_high).

    Source: Yu et al. 2025, DAPO (arXiv 2503.14476), section 3.1.
    """
    return low, options.ratio * high


register(
    Constraint(
        name="clip_higher",
        label="Clip-Higher",
        options=ClipHigherOptions,
        is_on=lambda options: options.ratio != 1,
        needs=lambda options: {"ratio"},
        parameter="ratio",
        uses_space=False,
        clip_bounds=raise_upper_bound,
    )
)
