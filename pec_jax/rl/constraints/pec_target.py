"""PEC with a target: lambda is the dual variable of H_perc >= H*. Beyond the paper."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.config.fields import field
from pec_jax.rl.constraint import Constraint, State, register, unit_field
from pec_jax.rl.constraints.pec import weighted_surprisal
from pec_jax.rl.signals import PERCEPTUAL


@dataclasses.dataclass(frozen=True)
class PecTargetOptions:
    """Holds the perceptual entropy at a share of the base model's."""

    target: float = field(
        "exp(H*) as a share of the base model's exp(H_perc); 0 is off.", 0.0, low=0.0, high=100.0
    )
    weight: float = field("Where lambda starts.", 0.0, low=0.0)
    rate: float = field("Change of lambda per nat and iteration.", 0.3, low=0.0)
    base_batches: int = field("Batches of prompts the base model is measured on.", 16, low=1)
    unit: str = unit_field()

    @property
    def space(self) -> str:
        """A target in the latent space would mean nothing: entropy is fixed there."""
        return PERCEPTUAL


def follow_target(
    options: PecTargetOptions, state: State, mean_surprisal: Float[Array, ""]
) -> State:
    """lambda <- max(0, lambda + rate (H* - H_perc)): dual ascent on H_perc >= H*.

    A rollout none of whose images could be perceived teaches nothing.

    Source: as SAC tunes its temperature, Haarnoja et al. 2018 (arXiv 1812.05905), section 5.
    """
    deficit = state["target"] - mean_surprisal
    moved = jnp.maximum(0.0, state["weight"] + options.rate * deficit)
    return state | {"weight": jnp.where(jnp.isfinite(deficit), moved, state["weight"])}


register(
    Constraint(
        name="pec_target",
        label="PEC (target)",
        options=PecTargetOptions,
        is_on=lambda options: options.target != 0,
        excludes=("pec",),
        parameter="target",
        target=lambda options: options.target,
        bonus=weighted_surprisal,
        update_state=follow_target,
    )
)
