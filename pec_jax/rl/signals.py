"""What a constraint may look at, and the quantities that several of them share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.rl.advantages import known_mean

PERCEPTUAL, LATENT = "perceptual", "latent"
RAW, REWARD_STD = "raw", "reward_std"

# An array for each sample: [P, K] or [S, P, K] of whole groups, [P, k] of a micro-batch.
PerSample = Float[Array, "... p k"]


_LATER: Any = None  # of a field that some hooks come too early to see


class Groups(NamedTuple):
    """What a part of a group must know of the whole of it; without gradient."""

    reward_std: Float[Array, "... p 1"]  # population std of the rewards
    surprisal_mean: Float[Array, "... p 1"]  # of the perceptual surprisal
    logp_mean: Float[Array, "... p 1"] = _LATER  # of the policy's log-prob


class Signals(NamedTuple):
    """What a constraint may look at; what a hook comes too early for is None.

    Whole-batch hooks see [P, K], or [S, P, K] with an axis of steps in front; the hooks of a loss
    see one step of some images of every group, [P, k]. What they need of the whole groups is in
    `groups`. An objective says which of the fields marked * it can fill. Rewards and surprisals
    are not finite where an image could not be judged.
    """

    rewards: PerSample
    surprisal: PerSample  # perceptual, nats per dimension
    groups: Groups
    logp: PerSample = _LATER  # * carries the gradient inside the losses
    logp_old: PerSample = _LATER  # *
    ratio: PerSample | None = None  # * w = p_theta / p_old, gradient stopped; None means 1
    advantages: PerSample = _LATER
    kl: PerSample = _LATER  # * divergence from the reference, carries the gradient
    dt: Float[Array, ""] = _LATER  # * what the step's variance has as a factor, see `time_factor`
    entropy: Float[Array, ""] = _LATER  # * analytic entropy of the step, with gradient
    weight: PerSample | None = None  # in means over samples, 1 on average; None is 1


def importance(signals: Signals) -> Array:
    """w = p_theta / p_old without gradient; 1 before the first update after a rollout."""
    return jnp.float32(1.0) if signals.ratio is None else jax.lax.stop_gradient(signals.ratio)


def live_ratio(signals: Signals) -> PerSample:
    """w with its gradient."""
    return jnp.exp(signals.logp - jax.lax.stop_gradient(signals.logp_old))


def sample_mean(signals: Signals, x: PerSample) -> Float[Array, ""]:
    """The mean over samples, as a loss takes it: some may be left out."""
    return jnp.mean(x if signals.weight is None else x * signals.weight)


def surprisal_in(signals: Signals, space: str) -> PerSample:
    """h of each sample, without gradient: perceptual, or -logp in the latent space."""
    h = signals.surprisal if space == PERCEPTUAL else -signals.logp
    return jax.lax.stop_gradient(h)


def mean_surprisal_in(signals: Signals, space: str) -> Array:
    """Its mean over the whole group [..., P, 1]."""
    if space == PERCEPTUAL:
        return signals.groups.surprisal_mean
    return -signals.groups.logp_mean


def whole_groups(rewards: PerSample, surprisal: PerSample, logp: PerSample | None) -> Groups:
    """The statistics of whole groups, of what is finite; rewards [P, K], the others [..., P, K]."""

    def mean(x: Array) -> Array:
        return known_mean(jax.lax.stop_gradient(x), -1)

    rewards = jax.lax.stop_gradient(rewards)
    return Groups(
        reward_std=jnp.sqrt(mean(jnp.square(rewards - mean(rewards)))),
        surprisal_mean=mean(surprisal),
        logp_mean=_LATER if logp is None else mean(logp),
    )


def in_unit(weight: Array, unit: str, signals: Signals) -> Array:
    """lambda in the unit of the rewards: [] as it is, or [..., P, 1] in each group's reward std.

    A weight in stds carries over between encoders and rewards of different scale.
    """
    return weight if unit == RAW else weight * signals.groups.reward_std


def covariances(signals: Signals, space: str) -> PerSample:
    """c_i = (A_i - mean A) (l_i - mean l), means over the whole batch and all trained steps.

    l is the log-density in the space, log p_theta or log p_perc. Their mean over i is the
    covariance that, by the source, drives the entropy down. Without gradient; not finite where l is
    not.

    Source: Cui et al. 2025, The Entropy Mechanism of RL (arXiv 2505.22617), eq. 9.
    """
    advantages = jax.lax.stop_gradient(signals.advantages)
    log_density = -surprisal_in(signals, space)
    advantages, log_density = jnp.broadcast_arrays(advantages, log_density)
    return (advantages - jnp.mean(advantages)) * (log_density - known_mean(log_density))
