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

import jax
import jax.numpy as jnp

from pec_jax.rl.losses import clipped_surrogate, ratio_metrics
from pec_jax.rl.signals import (
    SPACES,
    Array,
    Options,
    Signals,
    covariances,
    group_weight,
    importance,
    surprisal_in_space,
)

Bound = float | Array


# The hooks of `none`, which the others replace one by one.


def keep_reward(signals: Signals, options: Options) -> Array:
    """R~ = R."""
    del options
    return signals.rewards


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


def keep_weight(signals: Signals, options: Options) -> Array:
    """lambda is a constant."""
    del options
    return signals.weight


# The baselines.


def reference_kl(signals: Signals, options: Options) -> Array:
    """lambda mean KL(policy || reference).

    Source: Flow-GRPO (arXiv 2505.05470), eq. 5.
    """
    del options
    return signals.weight * jnp.mean(signals.kl)


def raise_upper_bound(
    signals: Signals, options: Options, low: Bound, high: Bound
) -> tuple[Bound, Bound]:
    """(e_low, clip_ratio e_high): good samples of low probability may rise further.

    Source: Yu et al. 2025, DAPO (arXiv 2503.14476), which has 0.28 against 0.2.
    """
    del signals
    return low, options.clip_ratio * high


def entropy_bonus(signals: Signals, options: Options) -> Array:
    """-lambda H, as a loss beside the policy's.

    gradient "score": H = mean w (s - mean_group s), s = -logp or the perceptual surprisal, without
    its own gradient; that of w is the score function's, mean (s - mean_group s) grad logp. With
    that of -logp as well, an update off the policy of the rollout would be pushed further away
    from it, for logp is a mean over dimensions and w makes up for one dimension's worth of it.
    The group's mean changes nothing in expectation and makes the bonus independent of s's unit.
    Beside a loss of normalised advantages, lambda counts advantage per nat, whatever `unit` says.
    gradient "exact": H is the analytic entropy of the policy, which depends on the schedule
    alone: nothing changes.

    Source: arXiv 2605.12112, section 3 (latent) and the baseline "Entropy Reg.".
    """
    if options.gradient == "exact":
        return -signals.weight * signals.entropy
    centred = surprisal_in_space(signals, options) - signals.groups.surprisal_mean
    return -signals.weight * jnp.mean(_live_ratio(signals) * centred)


def pick_from_band(signals: Signals, options: Options) -> Array:
    """A random share of the samples whose covariance lies in the band.

    Source: Cui et al. 2025 (arXiv 2505.22617), Clip-Cov. The band is given by quantiles here, for
    the absolute bounds of the source belong to thousands of tokens.
    """
    values = covariances(signals, options)
    low, high = jnp.quantile(values, jnp.asarray(options.cov_band))
    picked = jax.random.uniform(signals.key, values.shape) < options.cov_share
    return picked & (values >= low) & (values <= high)


def drop_selected(signals: Signals, options: Options, clip_low: Bound, clip_high: Bound) -> Array:
    """The clipped surrogate, 0 for the selected."""
    return jnp.where(signals.selected, 0.0, clipped_loss(signals, options, clip_low, clip_high))


def pick_top(signals: Signals, options: Options) -> Array:
    """The cov_share of the samples with the greatest covariance.

    Source: Cui et al. 2025 (arXiv 2505.22617), KL-Cov.
    """
    values = covariances(signals, options)
    # Strictly: with a share of 0, or where all are equal, none is marked.
    return values > jnp.quantile(values, 1.0 - options.cov_share)


def penalise_selected(
    signals: Signals, options: Options, clip_low: Bound, clip_high: Bound
) -> Array:
    """-A r, without clipping; for the selected, + lambda |logp - logp_old|."""
    del options, clip_low, clip_high
    log_ratio = signals.logp - jax.lax.stop_gradient(signals.logp_old)
    plain = -jax.lax.stop_gradient(signals.advantages) * jnp.exp(log_ratio)
    # |x| with the derivative 0 at 0, as torch has it: JAX takes 1 there, which at the first update
    # after a rollout, where every log-ratio is 0, would push all the selected down.
    size = log_ratio * jax.lax.stop_gradient(jnp.sign(log_ratio))
    return plain + jnp.where(signals.selected, signals.weight * size, 0.0)


# The paper's.


def add_surprisal(signals: Signals, options: Options) -> Array:
    """R~ = R + lambda w h: a reward for being unlike one's siblings.

    Source: arXiv 2605.12112, the PEC reward.
    """
    weighted = importance(signals) * surprisal_in_space(signals, options)
    return signals.rewards + group_weight(signals, options) * weighted


def subtract_divergence(signals: Signals, options: Options) -> Array:
    """R~ = R - lambda [w log p_perc - w log p_theta]: each step's share of the divergence.

    Source: arXiv 2605.12112, the PCVAE reward.
    """
    if options.kl_as == "loss":
        return signals.rewards
    log_p_theta = jax.lax.stop_gradient(signals.logp)
    divergence = -jax.lax.stop_gradient(signals.surprisal) - log_p_theta
    return signals.rewards - group_weight(signals, options) * importance(signals) * divergence


def divergence_loss(signals: Signals, options: Options) -> Array:
    """lambda mean [w log p_perc - w log p_theta], with the gradient of w and of log p_theta.

    The competing loss of the paper's figure 6a, for comparison.
    """
    if options.kl_as == "reward":
        return jnp.float32(0.0)
    divergence = -jax.lax.stop_gradient(signals.surprisal) - signals.logp
    return signals.weight * jnp.mean(_live_ratio(signals) * divergence)


# Beyond the paper.


def follow_target(signals: Signals, options: Options) -> Array:
    """lambda <- max(0, lambda + rate (H* - H_perc)): dual ascent on H_perc >= H*.

    Source: as SAC tunes its temperature, Haarnoja et al. 2018 (arXiv 1812.05905), section 5.
    """
    deficit = signals.target - jnp.mean(signals.surprisal)
    moved = jnp.maximum(0.0, signals.weight + options.rate * deficit)
    # A rollout with a number that is not finite teaches nothing.
    return jnp.where(jnp.isfinite(moved), moved, signals.weight)


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A method: its name, what it needs, and its hooks (see the top of this file)."""

    name: str
    spaces: tuple[str, ...] = SPACES  # in which it means something
    needs_reference: bool = False  # fill Signals.kl
    needs_target: bool = False  # fill Signals.target
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
        Constraint("clip_higher", clip_bounds=raise_upper_bound),
        Constraint("entropy_reg", extra_loss=entropy_bonus),
        Constraint("clip_cov", select=pick_from_band, sample_loss=drop_selected),
        Constraint("kl_cov", select=pick_top, sample_loss=penalise_selected),
        Constraint("pec", shape_reward=add_surprisal),
        Constraint(
            "pcvae",
            spaces=("perceptual",),
            shape_reward=subtract_divergence,
            extra_loss=divergence_loss,
        ),
        Constraint(
            "pec_target",
            spaces=("perceptual",),
            needs_target=True,
            shape_reward=add_surprisal,
            update_weight=follow_target,
        ),
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


def check_options(constraint: Constraint, options: Options) -> None:
    """Refuses combinations that mean nothing.

    Raises:
        ValueError: a space that the method does not have, or an exact gradient in a space that
            has none.
    """
    if options.space not in constraint.spaces:
        raise ValueError(
            f"The constraint {constraint.name!r} means nothing in space {options.space!r}, where "
            f"entropy does not depend on the policy; use {' or '.join(constraint.spaces)}."
        )
    if (
        constraint.name == "entropy_reg"
        and options.gradient == "exact"
        and options.space != "latent"
    ):
        raise ValueError(
            "The exact gradient of entropy_reg exists in space 'latent' only (and is zero there); "
            "in a perceptual space use gradient 'score'."
        )


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


def _live_ratio(signals: Signals) -> Array:
    """w with its gradient."""
    return jnp.exp(signals.logp - jax.lax.stop_gradient(signals.logp_old))
