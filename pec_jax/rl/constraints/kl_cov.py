"""KL-Cov: the samples that drive the entropy down most may not move far."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pec_jax.config.fields import field
from pec_jax.rl.constraint import Constraint, State, register, space_field, weight_field
from pec_jax.rl.signals import PerSample, Signals, covariances


@dataclasses.dataclass(frozen=True)
class KlCovOptions:
    """A quantile, for the absolute share of the source belongs to thousands of tokens."""

    weight: float = weight_field("beta of the penalty; 0 is off.")
    share: float = field("Of all samples, penalised.", 0.2, low=0.0, high=1.0)
    space: str = space_field()


def pick_top(options: KlCovOptions, signals: Signals, key: Array) -> Bool[Array, "... p k"]:
    """The share of the samples with the greatest covariance.

    Source: Cui et al. 2025 (arXiv 2505.22617), KL-Cov.
    """
    values = covariances(signals, options.space)
    # Strictly: with a share of 0, or where all are equal, none is marked.
    return values > jnp.nanquantile(values, 1.0 - options.share)


def penalise_selected(
    options: KlCovOptions, state: State, signals: Signals, losses: PerSample, selected: Array
) -> PerSample:
    """-A r, without clipping; for the selected, + beta |logp - logp_old|."""
    log_ratio = signals.logp - jax.lax.stop_gradient(signals.logp_old)
    plain = -jax.lax.stop_gradient(signals.advantages) * jnp.exp(log_ratio)
    # |x| with the derivative 0 at 0, as torch has it: JAX takes 1 there, which at the first update
    # after a rollout, where every log-ratio is 0, would push all the selected down.
    size = log_ratio * jax.lax.stop_gradient(jnp.sign(log_ratio))
    return plain + jnp.where(selected, state["weight"] * size, 0.0)


register(
    Constraint(
        name="kl_cov",
        label="KL-Cov",
        options=KlCovOptions,
        needs=lambda options: {"logp", "ratio"},
        excludes=("clip_cov", "clip_higher"),  # its loss has no clipping
        select=pick_top,
        sample_loss=penalise_selected,
    )
)
