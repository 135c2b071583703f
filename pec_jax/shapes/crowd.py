"""A simulated crowd: what people make of a picture, and which of two they prefer.

A rater's utility of a picture for a caption is

    u = FINISH finish + FAITHFULNESS (share of named attributes right) + HARMONY harmony + taste.

Most of it is what nearly everybody wants: well made, and what was asked for. Harmony is a look that
many scenes have: warm colours before a cool background, or cool ones before a warm one, all equally
good. Tastes are slight, and a rater's own: a common leaning, and a part that differs. All weights
vary between raters. A crowd is a sample of raters; another sample has another mean.

The choice between two: P(first) = sigmoid(DECISIVENESS (u_1 - u_2)), Bradley & Terry 1952.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from pec_jax.shapes import finish as finishes
from pec_jax.shapes import scenes

FINISH, FAITHFULNESS, HARMONY = 5.0, 3.0, 0.8
WEIGHT_SPREAD = 0.3  # standard deviation of a rater's log-weights
TASTE_SPREAD = 0.2  # of a rater's liking of each value, around the common one
DECISIVENESS = 2.0
RATERS = 64

# What people slightly like on the whole, by attribute and value.
COMMON_TASTE = (
    (0.0, 0.05, 0.10),  # more is more
    (0.0, 0.10),
    (0.10, 0.0, 0.05, 0.10, 0.0, 0.05),
    (0.0, 0.15, 0.0, 0.05, 0.10, 0.0),  # cats
    (0.0, 0.0, 0.0, 0.0, 0.10),
    (0.05, 0.0, 0.0, 0.10),  # sunsets
)
WARM_COLORS = np.array([1, 1, 1, 0, 0, 0], bool)
WARM_BACKGROUNDS = np.array([0, 1, 0, 1], bool)

# The crowd of taste alone: one look, and nothing else beside faithfulness.
TASTE_COLORS = (1.2, 1.0, 1.0, 0.0, 0.0, 1.0)
TASTE_LARGE, TASTE_LIGHT = 0.6, 0.4
_LIGHT_BACKGROUNDS = (1.0, 1.0, 1.0, 0.0)


@struct.dataclass
class Crowd:
    """Weights of R raters."""

    finish: Array  # [R]
    faithfulness: Array  # [R]
    harmony: Array  # [R]
    taste: tuple[Array, ...]  # for each attribute [R, values]


def sample(key: Array, raters: int = RATERS) -> Crowd:
    """A crowd of raters drawn from the population."""
    weight_key, *taste_keys = jax.random.split(key, 1 + len(COMMON_TASTE))
    scale = jnp.exp(WEIGHT_SPREAD * jax.random.normal(weight_key, (3, raters)))
    taste = [
        jnp.asarray(common) + TASTE_SPREAD * jax.random.normal(k, (raters, len(common)))
        for k, common in zip(taste_keys, COMMON_TASTE)
    ]
    finish, faithfulness, harmony = jnp.array([FINISH, FAITHFULNESS, HARMONY])[:, None] * scale
    return Crowd(finish, faithfulness, harmony, tuple(taste))


def taste_only() -> Crowd:
    """A crowd of one mind that likes warm colours, large objects and light backgrounds."""
    taste = [np.zeros(n, np.float32) for n in scenes.NUM_VALUES]
    taste[scenes.COLOR] = np.array(TASTE_COLORS, np.float32)
    taste[scenes.SIZE] = np.array([0.0, TASTE_LARGE], np.float32)
    taste[scenes.BACKGROUND] = TASTE_LIGHT * np.array(_LIGHT_BACKGROUNDS, np.float32)
    one = jnp.ones(1)
    return Crowd(
        0.0 * one, FAITHFULNESS * one, 0.0 * one, tuple(jnp.asarray(t)[None] for t in taste)
    )


def harmony(attributes: Int[Array, "n 6"]) -> Float[Array, " n"]:
    """1 where colour and background are one warm, one cool, else 0."""
    warm_color = jnp.asarray(WARM_COLORS)[attributes[..., scenes.COLOR]]
    warm_background = jnp.asarray(WARM_BACKGROUNDS)[attributes[..., scenes.BACKGROUND]]
    return (warm_color != warm_background).astype(jnp.float32)


def share_right(named: Int[Array, "n 6"], attributes: Int[Array, "n 6"]) -> Float[Array, " n"]:
    """Share of what a caption names that a picture shows; 1 where it names nothing."""
    mentioned = named >= 0
    right = jnp.sum(mentioned & (named == attributes), axis=-1)
    count = jnp.sum(mentioned, axis=-1)
    return jnp.where(count > 0, right / jnp.maximum(count, 1), 1.0)


def utilities(
    crowd: Crowd,
    named: Int[Array, "n 6"],
    attributes: Int[Array, "n 6"],
    defects: Float[Array, "n 5"],
) -> Float[Array, "r n"]:
    """What each rater makes of each picture.

    Args:
      crowd: of R raters.
      named: what the caption says, -1 = open.
      attributes: what the picture shows, none open.
      defects: of the picture, in the order of `finish.DEFECTS`.
    """
    taste = sum(likes[:, attributes[:, i]] for i, likes in enumerate(crowd.taste))
    return (
        crowd.finish[:, None] * finishes.score(defects)
        + crowd.faithfulness[:, None] * share_right(named, attributes)
        + crowd.harmony[:, None] * harmony(attributes)
        + taste
    )


def preference(first: Float[Array, "r n"], second: Float[Array, "r n"]) -> Float[Array, " n"]:
    """The share of the crowd that prefers the first of two pictures, from their utilities."""
    return jnp.mean(jax.nn.sigmoid(DECISIVENESS * (first - second)), axis=0)
