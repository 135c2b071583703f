"""The rule-based judge of the shapes world as a reward."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pec_jax.data.prompts import Prompt
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.base import Reward, RewardOptions, register
from pec_jax.shapes import judge, scenes
from pec_jax.types import PyTree


@register("attributes")
def make(options: RewardOptions, networks: Networks) -> Reward:
    """`judge.score` of 8-bit images against the parsed prompt."""

    def prepare(variables: PyTree, prompts: Sequence[Prompt]) -> Int[np.ndarray, "n attributes"]:
        return np.stack([scenes.parse(prompt.text) for prompt in prompts])

    def score(variables: PyTree, images: Array, attributes: Array) -> Array:
        groups, size = images.shape[:2]
        flat = to_uint8_levels(images).reshape(-1, *images.shape[2:])
        found = judge.score(flat, jnp.repeat(attributes, size, axis=0))
        return found.reshape(groups, size)

    return Reward("attributes", score, prepare)
