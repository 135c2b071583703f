"""The judge of the shapes world as a reward; the judge itself is tested in tests/shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.rewards import RewardOptions
from pec_jax.shapes import scenes


def scenes_of(caption):
    attributes = jnp.tile(jnp.asarray(scenes.parse(caption)), (2, 1))
    return jax.jit(lambda key: scenes.render(scenes.sample_scene(key, attributes)))(
        jax.random.key(0)
    )


def test_each_image_is_scored_against_its_own_prompt():
    reward = REWARDS["attributes"].make(RewardOptions(), None)
    inputs = reward.prepare({}, [Prompt("a red cat"), Prompt("a blue house")])
    red, blue = scenes_of("a red cat"), scenes_of("a blue house")
    images = jnp.stack([jnp.concatenate([red, blue[:1]]), jnp.concatenate([blue, red[:1]])])
    scores = jax.jit(reward.score)({}, images, inputs)
    np.testing.assert_allclose(scores, [[1, 1, 0], [1, 1, 0]])
    assert scores.dtype == jnp.float32 and reward.network == ""


def test_what_is_not_finite_is_not_hidden():
    reward = REWARDS["attributes"].make(RewardOptions(), None)
    scores = reward.score(
        {}, jnp.full((1, 1, 64, 64, 3), jnp.nan), reward.prepare({}, [Prompt("a thing")])
    )
    assert np.isnan(scores).all()
