"""Diversity as a person means it: how evenly the values of what a prompt leaves open are drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pec_jax.shapes import scenes


def attribute_entropy(
    values: Int[Array, "p k"], valid: Bool[Array, "p k"], num_values: int
) -> Float[Array, " p"]:
    """Entropy of an attribute over a prompt's images, over its maximum log(num_values).

    H = -sum q log q + (m - 1) / (2 n), with m values seen among the n valid images: few images show
    less entropy than there is, by about as much (Miller 1955).

    Args:
      values: of the attribute in each image; what is not in [0, num_values) does not count.
      valid: whether the image shows a scene.
      num_values: how many values it may have.

    Returns:
      In [0, 1]; 0 for a prompt without a valid image.
    """
    counted = (valid & (values >= 0))[..., None] * jax.nn.one_hot(values, num_values)
    counts = jnp.sum(counted, axis=1)  # [P, V]
    total = jnp.maximum(jnp.sum(counts, axis=-1), 1.0)
    share = counts / total[:, None]
    plugged_in = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    correction = (jnp.sum(counts > 0, axis=-1) - 1) / (2.0 * total)
    nats = jnp.where(jnp.any(counts > 0, axis=-1), plugged_in + correction, 0.0)
    return jnp.clip(nats / jnp.log(num_values), 0.0, 1.0)


def open_attributes(
    attributes: Int[Array, "p k 6"], found: Bool[Array, "p k"], named: Int[Array, "p 6"]
) -> Float[Array, " p"]:
    """Mean of `attribute_entropy` over the attributes that each prompt leaves open.

    Args:
      attributes: what each image shows.
      found: whether it shows a scene.
      named: what each prompt names, -1 = open.

    Returns:
      In [0, 1]; nan for a prompt that leaves nothing open.
    """
    entropies = jnp.stack(
        [attribute_entropy(attributes[..., i], found, n) for i, n in enumerate(scenes.NUM_VALUES)],
        axis=-1,
    )
    is_open = named < 0
    return jnp.sum(entropies * is_open, axis=-1) / jnp.sum(is_open, axis=-1)
