"""The clipped policy-gradient loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.types import Scalar


def policy_loss(
    logp: Float[Array, "..."],
    logp_old: Float[Array, "..."] | float,
    advantages: Float[Array, "..."] | float,
    clip_low: Scalar,
    clip_high: Scalar,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """PPO's clipped surrogate, averaged over all samples.

    mean max(-A r, -A clip(r, 1 - e_low, 1 + e_high)), r = exp(logp - logp_old)

    Args:
        logp: [...] of the steps under the policy being trained; carries the gradient.
        logp_old: [...] under the policy that took them.
        advantages: [...].
        clip_low: e_low >= 0 (Flow-GRPO on SD3: 1e-4, since logp is a mean over dimensions).
        clip_high: e_high >= 0.

    Returns:
        The loss, a scalar, and what `ratio_metrics` reports. Where r is exactly 1 its gradient
        is that of REINFORCE, -mean A grad logp.

    Source: Schulman et al. 2017, PPO (arXiv 1707.06347), eq. 7; Flow-GRPO, eq. 5.
    """
    losses = clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high)
    return jnp.mean(losses), ratio_metrics(logp, logp_old, clip_low, clip_high)


def clipped_surrogate(
    logp: Float[Array, "..."],
    logp_old: Float[Array, "..."] | float,
    advantages: Float[Array, "..."] | float,
    clip_low: Scalar,
    clip_high: Scalar,
) -> Float[Array, "..."]:
    """The loss of each sample in `policy_loss`.

    Args: as for `policy_loss`.

    Returns:
        [...] float32.
    """
    ratio = jnp.exp(logp - jax.lax.stop_gradient(logp_old))
    advantages = jax.lax.stop_gradient(advantages)
    # Written with where, not maximum and clip: at a tie (r = 1 with e = 0, or A = 0) these
    # share the gradient out between their branches, and halve it.
    too_high = (advantages > 0) & (ratio > 1.0 + clip_high)
    too_low = (advantages < 0) & (ratio < 1.0 - clip_low)
    bound = jnp.where(too_high, 1.0 + clip_high, 1.0 - clip_low)
    return -advantages * jnp.where(too_high | too_low, bound, ratio)


def ratio_metrics(
    logp: Float[Array, "..."],
    logp_old: Float[Array, "..."] | float,
    clip_low: Scalar,
    clip_high: Scalar,
) -> dict[str, Float[Array, ""]]:
    """What the importance ratios r look like.

    Args: as for `policy_loss`.

    Returns:
        `clip_fraction`, the share of samples with r outside [1 - e_low, 1 + e_high], and
        `ratio_max_deviation`, max |r - 1|: scalars without gradient.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(logp - logp_old))
    outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
    return {
        "clip_fraction": jnp.mean(outside.astype(jnp.float32)),
        "ratio_max_deviation": jnp.max(jnp.abs(ratio - 1.0)),
    }
