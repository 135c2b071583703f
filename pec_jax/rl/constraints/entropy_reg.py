"""An entropy bonus as a loss beside the policy's."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.config import ConfigError
from pec_jax.config.fields import field
from pec_jax.rl.constraint import Constraint, State, register, space_field, weight_field
from pec_jax.rl.signals import (
    LATENT,
    Signals,
    live_ratio,
    mean_surprisal_in,
    sample_mean,
    surprisal_in,
)


@dataclasses.dataclass(frozen=True)
class EntropyRegOptions:
    """The paper's baseline "Entropy Reg.", in either space."""

    weight: float = weight_field()
    space: str = space_field()
    gradient: str = field(
        "Score function, or that of the analytic entropy (latent only, and zero there).",
        "score",
        choices=("score", "exact"),
    )

    def __post_init__(self) -> None:
        if self.gradient == "exact" and self.space != LATENT:
            raise ConfigError(
                "config.constraints.entropy_reg: the exact gradient exists in space 'latent' only "
                "(and is zero there); in a perceptual space use gradient 'score'."
            )


def entropy_bonus(options: EntropyRegOptions, state: State, signals: Signals) -> Float[Array, ""]:
    """-lambda H.

    gradient "score": H = mean w (s - mean_group s), s = -logp or the perceptual surprisal, without
    its own gradient; that of w is the score function's, mean (s - mean_group s) grad logp. With
    that of -logp as well, an update off the policy of the rollout would be pushed further away
    from it, for logp is a mean over dimensions and w makes up for one dimension's worth of it.
    The group's mean changes nothing in expectation and makes the bonus independent of s's unit.
    Beside a loss of normalised advantages, lambda counts advantage per nat.
    gradient "exact": H is the analytic entropy of the policy, which depends on the schedule
    alone: nothing changes.

    Source: arXiv 2605.12112, section 3 (latent) and the baseline "Entropy Reg.".
    """
    if options.gradient == "exact":
        return -state["weight"] * signals.entropy
    centred = surprisal_in(signals, options.space) - mean_surprisal_in(signals, options.space)
    centred = jnp.where(jnp.isfinite(centred), centred, 0.0)
    return -state["weight"] * sample_mean(signals, live_ratio(signals) * centred)


def _needs(options: EntropyRegOptions) -> set[str]:
    return {"entropy"} if options.gradient == "exact" else {"logp", "ratio"}


register(
    Constraint(
        name="entropy_reg",
        label="Entropy Reg.",
        options=EntropyRegOptions,
        needs=_needs,
        extra_loss=entropy_bonus,
    )
)
