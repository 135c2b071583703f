"""Group-relative advantages: how much better an image is than its siblings."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

STD_SCOPES = ("group", "global")


class GroupStatistics(NamedTuple):
    """What rewards are centred and scaled by; all broadcast with [..., P, K].

    The mean is kept in two parts, which float32 cannot add up without loss: rewards of 1e4 that
    differ by .02 would get advantages that are off by .06.
    """

    offset: Float[Array, "... p 1"]  # of each group: its mean, rounded
    mean: Float[Array, "... p 1"]  # of each group's rewards less the offset
    std: Float[Array, "... p_or_1 1"]  # of each group, or of the whole batch


def group_statistics(
    rewards: Real[Array | np.ndarray, "... p k"], std: str = "group"
) -> GroupStatistics:
    """Mean of each group, and the population std of each group or of the whole batch.

    Args:
        rewards: [..., P, K], any unit; those that are not finite are left out. Groups (the last
            axis) are whole.
        std: "group" takes each group's own std; "global" that of the whole [P, K], which keeps
            groups of nearly equal rewards from being blown up.

    Returns:
        The statistics, float32 without gradient.

    Raises:
        ValueError: for a group of fewer than 2 images, or an unknown `std`.
    """
    if std not in STD_SCOPES:
        raise ValueError(f"Unknown advantage std {std!r}; choose one of {', '.join(STD_SCOPES)}.")
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"A group has {rewards.shape[-1]} image: an advantage compares at least 2; "
            "raise the number of images per prompt."
        )
    rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
    offset, mean = _exact_mean(rewards, -1)
    if std == "group":
        deviations = (rewards - offset) - mean
    else:
        center, rest = _exact_mean(rewards, (-2, -1))
        deviations = (rewards - center) - rest
    axes = -1 if std == "group" else (-2, -1)
    return GroupStatistics(offset, mean, jnp.sqrt(known_mean(jnp.square(deviations), axes)))


def known_mean(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Array:
    """Mean over an axis, which is kept, of what is finite; 0 where nothing is.

    Args:
        x: [...].
        axis: as in `jnp.mean`; None takes all, and keeps none.
    """
    known = jnp.isfinite(x)
    keep = axis is not None
    total = jnp.sum(jnp.where(known, x, 0.0), axis=axis, keepdims=keep)
    return total / jnp.maximum(jnp.sum(known, axis=axis, keepdims=keep), 1)


def _exact_mean(rewards: Array, axis: int | tuple[int, ...]) -> tuple[Array, Array]:
    """The mean as a rounded number and the rest."""
    offset = known_mean(rewards, axis)
    return offset, known_mean(rewards - offset, axis)


def advantages(
    rewards: Real[Array | np.ndarray, "... p k"],
    statistics: GroupStatistics,
    *,
    eps: float = 1e-4,
    clip: float = 5.0,
) -> Float[Array, "... p k"]:
    """Rewards, centred and scaled by their groups' statistics.

    A_k = clip((R_k - mean) / (std + eps), -clip, clip), and 0 where R_k is not finite

    Args:
        rewards: [..., P, k], any unit; some or all images of each group.
        statistics: of the whole groups.
        eps: keeps a group of equal rewards at advantage 0; in the unit of the rewards.
        clip: bound on |A|, > 0.

    Returns:
        [..., P, k] float32 without gradient.

    Source: Shao et al. 2024, GRPO (arXiv 2402.03300); Liu et al. 2025, Flow-GRPO, eq. 4.
    """
    rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
    centred = (rewards - statistics.offset) - statistics.mean
    found = jnp.clip(centred / (statistics.std + eps), -clip, clip)
    return jnp.where(jnp.isfinite(rewards), found, 0.0)


def group_advantages(
    rewards: Real[Array | np.ndarray, "... p k"],
    *,
    std: str = "group",
    eps: float = 1e-4,
    clip: float = 5.0,
) -> Float[Array, "... p k"]:
    """`advantages` of whole groups [..., P, K] by their own `group_statistics`."""
    return advantages(rewards, group_statistics(rewards, std), eps=eps, clip=clip)


def probabilities(advantages: Float[Array, "*p k"]) -> Float[Array, "*p k"]:
    """Softmax of the advantages within each group: how far it has singled out a winner.

    Args:
        advantages: [..., K].

    Returns:
        [..., K], sums to 1 over the last axis.
    """
    return jax.nn.softmax(advantages, axis=-1)
