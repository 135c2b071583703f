"""What a constraint may look at (`Signals`), what the config says of it (`Options`)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Maybe = Any  # an Array, or None for a hook that comes too early to see it

SPACES = ("perceptual", "latent")
UNITS = ("raw", "reward_std")
KL_AS = ("reward", "loss")
GRADIENTS = ("score", "exact")


class Groups(NamedTuple):
    """What a part of a group must know of the whole of it."""

    reward_std: Array  # [P, 1] population std of the rewards
    surprisal_mean: Array  # [P, 1] or [S, P, 1] of the surprisal in the constraint's space


class Signals(NamedTuple):
    """What a constraint may look at; fields a hook comes too early for are None.

    Whole-batch hooks see [P, K], or [S, P, K] with an axis of steps in front; `sample_loss` and
    `extra_loss`, and `shape_reward` once more, see one step of some images of every group,
    [P, k]. What they need of the whole groups is in `groups`.
    """

    weight: Array  # []           lambda, traced
    rewards: Maybe = None  # [P, K]
    surprisal: Maybe = None  # [..., P, K] perceptual, nats per dimension
    logp: Maybe = None  # [..., P, K] carries the gradient inside the losses
    logp_old: Maybe = None  # [..., P, K]
    ratio: Maybe = None  # [..., P, K] w, gradient stopped; None means 1
    advantages: Maybe = None  # [..., P, K]
    kl: Maybe = None  # [..., P, K] to the reference, carries the gradient
    entropy: Maybe = None  # []  analytic entropy of the policy's step, carries the gradient
    selected: Maybe = None  # [..., P, K] what `select` returned
    target: Maybe = None  # []  H*, for a weight that is a dual variable
    key: Maybe = None  # for a `select` that draws at random
    groups: Maybe = None  # Groups: statistics of the whole groups, as the rollout left them


@dataclasses.dataclass(frozen=True)
class Options:
    """What the config says about a constraint. Static; each method reads what it needs.

    space: where surprise is measured: "perceptual" (the encoders' features) or "latent" (the
        policy's own Gaussian, -logp).
    unit: of lambda: "raw" (reward per nat) or "reward_std" (the group's reward std per nat).
    clip_ratio: of clip_higher, e_high over the e_high of the config, >= 1.
    cov_band: of clip_cov, the quantiles of the covariances between which losses are dropped.
    cov_share: of clip_cov, the share of the samples in the band that is dropped; of kl_cov, the
        share of all samples that is penalised.
    kl_as: of pcvae, whether the divergence is a "reward" or a "loss".
    gradient: of entropy_reg, "score" (score function) or "exact" (of the analytic entropy).
    rate: of pec_target, the step of the dual variable, lambda per nat.
    """

    space: str = "perceptual"
    unit: str = "raw"
    clip_ratio: float = 1.4
    cov_band: tuple[float, float] = (0.8, 1.0)
    cov_share: float = 0.2
    kl_as: str = "reward"
    gradient: str = "score"
    rate: float = 0.1

    def __post_init__(self) -> None:
        choices = {"space": SPACES, "unit": UNITS, "kl_as": KL_AS, "gradient": GRADIENTS}
        for field, valid in choices.items():
            value = getattr(self, field)
            if value not in valid:
                raise ValueError(
                    f"Unknown constraint {field} {value!r}; choose one of {', '.join(valid)}."
                )
        low, high = self.cov_band
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"The constraint's cov_band is {self.cov_band}: give two rising quantiles in "
                "[0, 1]."
            )


def importance(signals: Signals) -> Array:
    """w = p_theta / p_old without gradient; 1 before the first update after a rollout."""
    return jnp.float32(1.0) if signals.ratio is None else jax.lax.stop_gradient(signals.ratio)


def surprisal_in_space(signals: Signals, options: Options) -> Array:
    """h of each sample, without gradient: perceptual, or -logp in the latent space."""
    h = signals.surprisal if options.space == "perceptual" else -signals.logp
    return jax.lax.stop_gradient(h)


def whole_groups(signals: Signals, options: Options) -> Signals:
    """The signals of whole groups with `groups` filled in.

    Args:
        signals: rewards [P, K], and logp or surprisal [..., P, K], as the constraint's space is.
        options: of the method.
    """
    surprise = surprisal_in_space(signals, options)
    return signals._replace(
        groups=Groups(
            reward_std=jnp.std(jax.lax.stop_gradient(signals.rewards), axis=-1, keepdims=True),
            surprisal_mean=jnp.mean(surprise, axis=-1, keepdims=True),
        )
    )


def group_weight(signals: Signals, options: Options) -> Array:
    """lambda in the unit of the rewards: [], or [P, 1] where it is given in reward stds.

    The population std of each group, without gradient. Such a weight carries over between
    encoders and rewards of different scale.
    """
    if options.unit == "raw":
        return signals.weight
    return signals.weight * signals.groups.reward_std


def covariances(signals: Signals, options: Options) -> Array:
    """c_i = (A_i - mean A) (l_i - mean l), means over the whole batch and all trained steps.

    l is the log-density in the constraint's space, log p_theta or log p_perc. Their mean over i
    is the covariance that, by the paper's source, drives the entropy down.

    Args:
        signals: advantages and logp or surprisal, [..., P, K].

    Returns:
        [..., P, K] without gradient.

    Source: Cui et al. 2025, The Entropy Mechanism of RL (arXiv 2505.22617), eq. 9.
    """
    advantages = jax.lax.stop_gradient(signals.advantages)
    log_density = -surprisal_in_space(signals, options)
    advantages, log_density = jnp.broadcast_arrays(advantages, log_density)
    return (advantages - jnp.mean(advantages)) * (log_density - jnp.mean(log_density))
