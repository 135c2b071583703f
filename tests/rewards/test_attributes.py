"""The judge of the shapes world as a reward; the judge itself is tested in tests/shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.rewards import RewardOptions
from pec_jax.shapes import finish, render, scenes


def scenes_of(caption):
    attributes = jnp.tile(jnp.asarray(scenes.parse(caption)), (2, 1))
    scene = scenes.sample_scene(jax.random.key(0), attributes)
    return render.draw(scene, jnp.zeros(2))


def test_each_image_is_scored_against_its_own_prompt():
    reward = REWARDS["attributes"].make(RewardOptions(), None)
    inputs = reward.prepare({}, [Prompt("a red cat"), Prompt("a blue house")])
    red, blue = scenes_of("a red cat"), scenes_of("a blue house")
    images = jnp.stack([jnp.concatenate([red, blue[:1]]), jnp.concatenate([blue, red[:1]])])
    scores = jax.jit(reward.score)({}, images, inputs)
    third = 1 / 3  # "a" names the number, which is right in all of them
    np.testing.assert_allclose(scores, [[1, 1, third], [1, 1, third]], rtol=1e-6)
    assert scores.dtype == jnp.float32 and reward.network == ""


def test_what_is_not_finite_is_not_hidden():
    reward = REWARDS["attributes"].make(RewardOptions(), None)
    scores = reward.score(
        {}, jnp.full((1, 1, 64, 64, 3), jnp.nan), reward.prepare({}, [Prompt("a thing")])
    )
    assert np.isnan(scores).all()


def test_an_evaluation_sees_score_finish_and_what_was_left_open():
    reward = REWARDS["attributes"].make(RewardOptions(), None)
    captions, (groups, size) = ("a red cat", "a thing"), (2, 32)
    named = np.stack([scenes.parse(caption) for caption in captions])
    rows = jnp.repeat(jnp.asarray(named), size, axis=0)
    scene = scenes.sample_scene(jax.random.key(0), rows)
    defects = jnp.tile(jnp.repeat(jnp.array([[0.0], [0.8]]), size // 2, axis=0), (groups, 5))
    made = finish.from_defects(jax.random.key(1), defects)
    images = render.render(jax.random.key(2), scene, made).reshape(groups, size, 64, 64, 3)
    found = jax.jit(reward.measure)({}, images, jnp.asarray(named))
    np.testing.assert_allclose(
        found.scores["attributes"], reward.score({}, images, jnp.asarray(named)), atol=1e-6
    )
    good, bad = np.split(np.asarray(found.scores["finish"]), 2, axis=1)
    assert abs(good.mean() - 1.0) < 0.1 and abs(bad.mean() - 0.2) < 0.1
    entropy = np.asarray(found.diversities["attributes"])
    assert (entropy > 0.9).all()
    same = jnp.repeat(images[:, :1], size, axis=1)
    none = jax.jit(reward.measure)({}, same, jnp.asarray(named)).diversities["attributes"]
    np.testing.assert_array_equal(none, [0.0, 0.0])
