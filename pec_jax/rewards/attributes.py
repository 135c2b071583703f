"""The rule-based judge of the shapes world as a reward: is what was asked for there?"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pec_jax.data.prompts import Prompt
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.base import Measures, Reward, RewardOptions, register
from pec_jax.shapes import diversity, finish, judge, scenes
from pec_jax.types import PyTree


@register("attributes")
def make(options: RewardOptions, networks: Networks) -> Reward:
    """`judge.score` of 8-bit images; in an evaluation all that the judge sees, by one look."""
    return Reward("attributes", score, parse_all, measure=measure)


def parse_all(variables: PyTree, prompts: Sequence[Prompt]) -> Int[np.ndarray, "n attributes"]:
    """What each prompt names, -1 = open."""
    return np.stack([scenes.parse(prompt.text) for prompt in prompts])


def score(
    variables: PyTree, images: Float[Array, "p k h w 3"], named: Int[Array, "p attributes"]
) -> Float[Array, "p k"]:
    """The share of the named attributes that are right."""
    found = judge.score(_as_list(images), jnp.repeat(named, images.shape[1], axis=0))
    return found.reshape(images.shape[:2])


def measure(
    variables: PyTree, images: Float[Array, "p k h w 3"], named: Int[Array, "p attributes"]
) -> Measures:
    """`quality/attributes`, the score; `quality/finish`, 0 where no picture of the world was found;
    `diversity/attributes`, the entropy of what the prompt leaves open, over its maximum.
    """
    flat, by_group = _as_list(images), images.shape[:2]
    detected = judge.detect(flat)
    finite = jnp.all(jnp.isfinite(flat), axis=(1, 2, 3))
    right = judge.share_right(detected, jnp.repeat(named, images.shape[1], axis=0))
    made = jnp.where(detected.found, finish.score(detected.defects), 0.0)
    scores = {
        name: jnp.where(finite, value, jnp.nan).reshape(by_group)
        for name, value in {"attributes": right, "finish": made}.items()
    }
    entropy = diversity.open_attributes(
        detected.attributes.reshape(*by_group, -1), detected.found.reshape(by_group), named
    )
    return Measures(scores, {"attributes": entropy})


def _as_list(images: Array) -> Array:
    """[P, K, H, W, 3] -> [P K, H, W, 3], as saved files would hold them."""
    return to_uint8_levels(images).reshape(-1, *images.shape[2:])
