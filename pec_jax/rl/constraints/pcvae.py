"""PCVAE: the perceptual distribution is pulled to the policy's own, constant one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.config.fields import field
from pec_jax.rl.constraint import Constraint, State, register, unit_field, weight_field
from pec_jax.rl.signals import PerSample, Signals, importance, in_unit, live_ratio, sample_mean


@dataclasses.dataclass(frozen=True)
class PcvaeOptions:
    """The paper has lambda = .03 and .10."""

    weight: float = weight_field()
    unit: str = unit_field()
    kl_as: str = field(
        "The divergence as a reward (the paper's finding), or as a loss that competes.",
        "reward",
        choices=("reward", "loss"),
    )


def negative_divergence(options: PcvaeOptions, state: State, signals: Signals) -> PerSample:
    """-lambda [w log p_perc - w log p_theta], each step's share of the divergence.

    Source: arXiv 2605.12112, the PCVAE reward.
    """
    if options.kl_as == "loss":
        return jnp.zeros_like(signals.rewards)
    log_p_theta = jax.lax.stop_gradient(signals.logp)
    divergence = -jax.lax.stop_gradient(signals.surprisal) - log_p_theta
    return -(in_unit(state["weight"], options.unit, signals) * importance(signals) * divergence)


def divergence_loss(options: PcvaeOptions, state: State, signals: Signals) -> Float[Array, ""]:
    """lambda mean [w log p_perc - w log p_theta], with the gradient of w and of log p_theta.

    The competing loss of the paper's figure 6a, for comparison.
    """
    if options.kl_as == "reward":
        return jnp.float32(0.0)
    surprisal = jax.lax.stop_gradient(signals.surprisal)
    surprisal = jnp.where(jnp.isfinite(surprisal), surprisal, signals.groups.surprisal_mean)
    divergence = -surprisal - signals.logp
    return state["weight"] * sample_mean(signals, live_ratio(signals) * divergence)


register(
    Constraint(
        name="pcvae",
        label="PCVAE",
        options=PcvaeOptions,
        needs=lambda options: {"logp", "ratio"},
        bonus=negative_divergence,
        extra_loss=divergence_loss,
    )
)
