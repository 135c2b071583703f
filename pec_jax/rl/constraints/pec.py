"""PEC, the paper's perceptual entropy constraint: a reward for being unlike one's siblings."""

from __future__ import annotations

import dataclasses
from typing import Any

from pec_jax.rl.constraint import (
    Constraint,
    State,
    register,
    space_field,
    space_needs,
    unit_field,
    weight_field,
)
from pec_jax.rl.signals import PerSample, Signals, importance, in_unit, surprisal_in


@dataclasses.dataclass(frozen=True)
class PecOptions:
    """The paper has lambda = .05 and .10, raw, in the spaces of PickScore and DINO."""

    weight: float = weight_field()
    unit: str = unit_field()
    space: str = space_field()


def weighted_surprisal(options: Any, state: State, signals: Signals) -> PerSample:
    """lambda w h, so that R~ = R + lambda w h; of any options with a unit and a space.

    Source: arXiv 2605.12112, the PEC reward.
    """
    weighted = importance(signals) * surprisal_in(signals, options.space)
    return in_unit(state["weight"], options.unit, signals) * weighted


register(
    Constraint(
        name="pec",
        label="PEC",
        options=PecOptions,
        needs=space_needs,
        excludes=("pec_target",),
        bonus=weighted_surprisal,
    )
)
