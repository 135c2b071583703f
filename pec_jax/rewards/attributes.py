"""The rule-based judge of the shapes world as a reward: is what was asked for there?"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pec_jax.data.prompts import Prompt
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.base import Reward, RewardOptions, register
from pec_jax.shapes import diversity, judge, scenes
from pec_jax.types import PyTree


@register("attributes")
def make(options: RewardOptions, networks: Networks) -> Reward:
    """`judge.score` of 8-bit images; its diversity is the entropy of what a prompt leaves open."""

    def score(variables: PyTree, images: Array, named: Array) -> Array:
        groups, size = images.shape[:2]
        found = judge.score(as_list(images), jnp.repeat(named, size, axis=0))
        return found.reshape(groups, size)

    def entropy(variables: PyTree, images: Array, named: Array) -> Array:
        detected, by_group = judge.detect(as_list(images)), images.shape[:2]
        return diversity.open_attributes(
            detected.attributes.reshape(*by_group, -1), detected.found.reshape(by_group), named
        )

    return Reward("attributes", score, parse_all, diversity=entropy)


def as_list(images: Float[Array, "p k h w 3"]) -> Float[Array, "n h w 3"]:
    """What a saved file would hold of each image of P groups."""
    return to_uint8_levels(images).reshape(-1, *images.shape[2:])


def parse_all(variables: PyTree, prompts: Sequence[Prompt]) -> Int[np.ndarray, "n attributes"]:
    """What each prompt names, -1 = open."""
    return np.stack([scenes.parse(prompt.text) for prompt in prompts])
