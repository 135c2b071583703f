"""How well a picture of the shapes world is made, by rules; the prompt does not matter."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pec_jax.perception.networks import Networks
from pec_jax.rewards.attributes import as_list
from pec_jax.rewards.base import Reward, RewardOptions, register
from pec_jax.shapes import finish, judge
from pec_jax.types import PyTree


@register("finish")
def make(options: RewardOptions, networks: Networks) -> Reward:
    """`finish.score` of 8-bit images; 0 where no picture of the world was found."""

    def score(variables: PyTree, images: Array, inputs: PyTree) -> Array:
        flat = as_list(images)
        detected = judge.detect(flat)
        found = jnp.where(detected.found, finish.score(detected.defects), 0.0)
        finite = jnp.all(jnp.isfinite(flat), axis=(1, 2, 3))
        return jnp.where(finite, found, jnp.nan).reshape(images.shape[:2])

    return Reward("finish", score)
