"""Constraints: what is added to GRPO to keep, or not to keep, the images diverse.

A constraint is a name and a few hooks, each a pure function of `Signals` (what the step knows)
and `Options` (what the config says). A new method is one small function and one entry in
CONSTRAINTS. In the order in which a training step calls them:

    shape_reward     [..., P, K]  what replaces the rewards, before the advantages
    clip_bounds      (low, high)  of the policy loss
    select           [..., P, K]  marks samples of the whole batch, once per rollout
    sample_loss      [...]        the loss of each sample in a micro-batch
    extra_loss       []           added to the mean of those
    update_weight    []           lambda for the next iteration
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pec_jax.grpo.loss import clipped_surrogate, ratio_metrics

Array = jax.Array
Bound = float | Array
Maybe = Any  # an Array, or None for a hook that comes too early to see it

SPACES = ("perceptual", "latent")
UNITS = ("raw", "reward_std")


class Signals(NamedTuple):
    """What a constraint may look at; fields a hook comes too early for are None.

    Whole-batch hooks see [P, K], or [S, P, K] with an axis of steps in front; `sample_loss` and
    `extra_loss` see the same fields of one micro-batch, of whatever shape they share.
    """

    weight: Array  # []           lambda, traced
    rewards: Maybe = None  # [P, K]
    surprisal: Maybe = None  # [..., P, K] perceptual, nats per dimension
    logp: Maybe = None  # [..., P, K] carries the gradient inside the losses
    logp_old: Maybe = None  # [..., P, K]
    ratio: Maybe = None  # [..., P, K] w, gradient stopped; None means 1
    advantages: Maybe = None  # [..., P, K]
    kl: Maybe = None  # [..., P, K] to the reference, carries the gradient
    selected: Maybe = None  # [..., P, K] what `select` returned
    key: Maybe = None  # for a `select` that draws at random


@dataclasses.dataclass(frozen=True)
class Options:
    """What the config says about a constraint. Static.

    space: where surprise is measured: "perceptual" (the encoder's features) or "latent" (the
        policy's own Gaussian, -logp).
    unit: of lambda: "raw" (reward per nat) or "reward_std" (the group's reward std per nat).
    """

    space: str = "perceptual"
    unit: str = "raw"

    def __post_init__(self) -> None:
        for field, valid in (("space", SPACES), ("unit", UNITS)):
            value = getattr(self, field)
            if value not in valid:
                raise ValueError(
                    f"Unknown constraint {field} {value!r}; choose one of {', '.join(valid)}."
                )


def keep_reward(signals: Signals, options: Options) -> Array:
    """R~ = R."""
    del options
    return signals.rewards


def add_surprisal(signals: Signals, options: Options) -> Array:
    """R~ = R + lambda w h: a reward for being unlike one's siblings.

    Source: arXiv 2605.12112, the PEC reward.
    """
    weighted = importance(signals) * surprisal_in_space(signals, options)
    return signals.rewards + group_weight(signals, options) * weighted


def keep_bounds(signals: Signals, options: Options, low: Bound, high: Bound) -> tuple[Bound, Bound]:
    """(e_low, e_high) as the config has them."""
    del signals, options
    return low, high


def clipped_loss(signals: Signals, options: Options, clip_low: Bound, clip_high: Bound) -> Array:
    """PPO's clipped surrogate of each sample."""
    del options
    return clipped_surrogate(
        signals.logp, signals.logp_old, signals.advantages, clip_low, clip_high
    )


def no_extra_loss(signals: Signals, options: Options) -> Array:
    """0."""
    del signals, options
    return jnp.float32(0.0)


def reference_kl(signals: Signals, options: Options) -> Array:
    """lambda mean KL(policy || reference).

    Source: Flow-GRPO (arXiv 2505.05470), eq. 5.
    """
    del options
    return signals.weight * jnp.mean(signals.kl)


def keep_weight(signals: Signals, options: Options) -> Array:
    """lambda is a constant."""
    del options
    return signals.weight


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A method: its name, what it needs computed, and its hooks (see the top of this file)."""

    name: str
    needs_reference: bool = False  # fill Signals.kl
    needs_surprisal: bool = False  # fill Signals.surprisal
    shape_reward: Callable[[Signals, Options], Array] = keep_reward
    clip_bounds: Callable[[Signals, Options, Bound, Bound], tuple[Bound, Bound]] = keep_bounds
    select: Callable[[Signals, Options], Array] | None = None
    sample_loss: Callable[[Signals, Options, Bound, Bound], Array] = clipped_loss
    extra_loss: Callable[[Signals, Options], Array] = no_extra_loss
    update_weight: Callable[[Signals, Options], Array] = keep_weight


CONSTRAINTS: dict[str, Constraint] = {
    c.name: c
    for c in (
        Constraint("none"),
        Constraint("kl", needs_reference=True, extra_loss=reference_kl),
        Constraint("pec", needs_surprisal=True, shape_reward=add_surprisal),
    )
}


def get_constraint(name: str) -> Constraint:
    """The constraint of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in CONSTRAINTS:
        raise ValueError(f"Unknown constraint {name!r}; choose one of {', '.join(CONSTRAINTS)}.")
    return CONSTRAINTS[name]


def constrained_loss(
    constraint: Constraint,
    signals: Signals,
    options: Options,
    clip_low: Bound,
    clip_high: Bound,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one micro-batch: the policy's, as the constraint has it, plus its extra term.

    Args:
        constraint: the method.
        signals: of the micro-batch; logp (and kl, where needed) carry the gradient.
        options: of the method.
        clip_low: e_low of the config, before the constraint moves it.
        clip_high: e_high likewise.

    Returns:
        The loss, a scalar, and `clip_fraction`, `ratio_max_deviation`, `constraint_loss`.
    """
    clip_low, clip_high = constraint.clip_bounds(signals, options, clip_low, clip_high)
    losses = constraint.sample_loss(signals, options, clip_low, clip_high)
    extra = constraint.extra_loss(signals, options)
    metrics = ratio_metrics(signals.logp, signals.logp_old, clip_low, clip_high)
    metrics["constraint_loss"] = jax.lax.stop_gradient(extra)
    return jnp.mean(losses) + extra, metrics


def importance(signals: Signals) -> Array:
    """w = p_theta / p_old without gradient; 1 before the first update after a rollout."""
    return jnp.float32(1.0) if signals.ratio is None else jax.lax.stop_gradient(signals.ratio)


def surprisal_in_space(signals: Signals, options: Options) -> Array:
    """h of each sample, without gradient: perceptual, or -logp in the latent space."""
    h = signals.surprisal if options.space == "perceptual" else -signals.logp
    return jax.lax.stop_gradient(h)


def group_weight(signals: Signals, options: Options) -> Array:
    """lambda in the unit of the rewards: [], or [P, 1] where it is given in reward stds.

    The population std of each group, without gradient. Such a weight carries over between
    encoders and rewards of different scale.
    """
    if options.unit == "raw":
        return signals.weight
    rewards = jax.lax.stop_gradient(signals.rewards)
    return signals.weight * jnp.std(rewards, axis=-1, keepdims=True)
