"""Group-relative advantages: how much better an image is than its siblings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
STD_SCOPES = ("group", "global")


def group_advantages(
    rewards: Array,
    *,
    std: str = "group",
    global_std: Array | float | None = None,
    eps: float = 1e-4,
    clip: float = 5.0,
) -> Array:
    """Rewards, centred and scaled within their group.

    A_k = clip((R_k - mean_group R) / (std R + eps), -clip, clip), population std.

    Args:
        rewards: [..., P, K], any unit. Groups (the last axis) are whole.
        std: "group" takes each group's own std; "global" that of the whole [P, K], which keeps
            groups of nearly equal rewards from being blown up.
        global_std: with "global", the std to use instead, where `rewards` is a part of the
            batch only.
        eps: keeps a group of equal rewards at advantage 0; in the unit of the rewards.
        clip: bound on |A|, > 0.

    Returns:
        [..., P, K] float32 without gradient.

    Raises:
        ValueError: for a group of fewer than 2 images, an unknown `std`, or a `global_std`
            given for "group".

    Source: Shao et al. 2024, GRPO (arXiv 2402.03300); Liu et al. 2025, Flow-GRPO, eq. 4.
    """
    if std not in STD_SCOPES:
        raise ValueError(f"Unknown advantage std {std!r}; choose one of {', '.join(STD_SCOPES)}.")
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"A group has {rewards.shape[-1]} image: an advantage compares at least 2; "
            "raise the number of images per prompt."
        )
    rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    if std == "group":
        if global_std is not None:
            raise ValueError("global_std is given but std is 'group': set std to 'global'.")
        scale = jnp.std(rewards, axis=-1, keepdims=True)
    elif global_std is not None:
        scale = jax.lax.stop_gradient(jnp.asarray(global_std, jnp.float32))
    else:
        scale = jnp.std(rewards, axis=(-2, -1), keepdims=True)
    return jnp.clip(centred / (scale + eps), -clip, clip)


def probabilities(advantages: Array) -> Array:
    """Softmax of the advantages within each group: how far it has singled out a winner.

    Args:
        advantages: [..., K].

    Returns:
        [..., K], sums to 1 over the last axis.
    """
    return jax.nn.softmax(advantages, axis=-1)
