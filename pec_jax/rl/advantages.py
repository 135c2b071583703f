"""Group-relative advantages: how much better an image is than its siblings."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

STD_SCOPES = ("group", "global")


class GroupStatistics(NamedTuple):
    """What rewards are centred and scaled by; both broadcast with [..., P, K]."""

    mean: Float[Array, "... p 1"]  # of each group
    std: Float[Array, "... p_or_1 1"]  # of each group, or of the whole batch


def group_statistics(
    rewards: Real[Array | np.ndarray, "... p k"], std: str = "group"
) -> GroupStatistics:
    """Mean of each group, and the population std of each group or of the whole batch.

    Args:
        rewards: [..., P, K], any unit. Groups (the last axis) are whole.
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
    axes = -1 if std == "group" else (-2, -1)
    return GroupStatistics(
        mean=jnp.mean(rewards, axis=-1, keepdims=True),
        std=jnp.std(rewards, axis=axes, keepdims=True),
    )


def advantages(
    rewards: Real[Array | np.ndarray, "... p k"],
    statistics: GroupStatistics,
    *,
    eps: float = 1e-4,
    clip: float = 5.0,
) -> Float[Array, "... p k"]:
    """Rewards, centred and scaled by their groups' statistics.

    A_k = clip((R_k - mean) / (std + eps), -clip, clip)

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
    return jnp.clip((rewards - statistics.mean) / (statistics.std + eps), -clip, clip)


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
