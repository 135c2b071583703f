"""The weighted sum of rewards."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.data.prompts import Prompt
from pec_jax.rewards import Reward, RewardOptions, field, register
from pec_jax.rewards.base import Measures
from pec_jax.rewards.combined import CombinedReward, make_rewards

IMAGES = jax.random.uniform(jax.random.key(0), (2, 3, 4, 4, 3))
PROMPTS = [Prompt("a"), Prompt("four")]
NETWORKS = {"gains": {"red": jnp.float32(3.0)}}
RED = Reward(
    "red",
    lambda variables, images, inputs: variables["red"] * images[..., 0].mean((-2, -1)),
    network="gains",
)
LENGTH = Reward(
    "length",
    lambda _, images, inputs: jnp.repeat(inputs[:, None], images.shape[1], 1),
    lambda _, prompts: np.array([len(p.text) for p in prompts]),
)


def combined(**weights):
    rewards = {"red": RED, "length": LENGTH}
    return CombinedReward({name: rewards[name] for name in weights}, weights)


def test_weighted_sum():
    reward = combined(red=2.0, length=-0.5)
    inputs = reward.prepare(NETWORKS, PROMPTS)
    total, parts = jax.jit(reward.score)(NETWORKS, IMAGES, inputs)
    red = 3.0 * np.asarray(IMAGES)[..., 0].mean((-2, -1))
    length = np.array([[1.0] * 3, [4.0] * 3])
    np.testing.assert_allclose(parts["red"], red, rtol=1e-6)
    np.testing.assert_array_equal(parts["length"], length)
    np.testing.assert_allclose(total, 2 * red - 0.5 * length, rtol=1e-6)
    assert total.dtype == parts["length"].dtype == jnp.float32


def test_an_evaluation_publishes_what_is_measured_or_else_the_score():
    def measure(variables, images, inputs):
        return Measures({"sharp": images[..., 1].mean((-2, -1))}, {"spread": inputs / 4})

    judge = dataclasses.replace(LENGTH, measure=measure)
    reward = CombinedReward({"red": RED, "length": judge}, {"red": 1.0, "length": 0.0})
    found = jax.jit(reward.measure)(NETWORKS, IMAGES, reward.prepare(NETWORKS, PROMPTS))
    assert set(found.scores) == {"red", "sharp"}
    np.testing.assert_allclose(
        found.scores["red"], 3.0 * np.asarray(IMAGES)[..., 0].mean((-2, -1)), rtol=1e-6
    )
    np.testing.assert_allclose(found.diversities["spread"], [0.25, 1.0])


def test_weights_of_networks_are_arguments_not_constants():
    reward = combined(red=1.0)
    score = jax.jit(reward.score)
    once, twice = (
        score({"gains": {"red": jnp.float32(gain)}}, IMAGES, {"red": {}})[0] for gain in (1, 2)
    )
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_weight_zero_is_only_measured():
    """And what it gives, NaN included, does not touch the sum."""
    reward = combined(red=0.0, length=1.0)
    total, parts = reward.score(NETWORKS, IMAGES * jnp.nan, reward.prepare(NETWORKS, PROMPTS))
    assert np.isnan(parts["red"]).all()
    np.testing.assert_array_equal(total, parts["length"])
    trained = reward.trained()
    assert (list(trained.rewards), trained.weights) == (["length"], {"length": 1.0})
    total, _ = combined(red=0.0).score(NETWORKS, IMAGES, {"red": {}})
    np.testing.assert_array_equal(total, np.zeros((2, 3)))


def test_wrong_shape_names_the_reward():
    reward = CombinedReward({"bad": Reward("bad", lambda *_: jnp.zeros(2))}, {"bad": 1.0})
    with pytest.raises(ValueError, match=r"'bad' returned an array of shape \(2,\)"):
        reward.score({}, IMAGES, reward.prepare({}, PROMPTS))


@dataclasses.dataclass(frozen=True)
class ShadeOptions(RewardOptions):
    """Of a reward that says whether it was made."""

    level: float = field("What every image gets.", 0.5)


def test_what_is_neither_trained_on_nor_evaluated_is_not_made(registry):
    made = []
    for name in ("shade", "light", "dark"):

        @register(name, ShadeOptions)
        def make(options, networks, name=name):
            made.append(name)
            return Reward(name, lambda _, images, i: jnp.full(images.shape[:2], options.level))

    sections = {
        "shade": ShadeOptions(weight=-2.0, level=0.25),
        "light": ShadeOptions(evaluate=True),
        "dark": ShadeOptions(),
    }
    reward = make_rewards(sections, None)
    assert made == ["shade", "light"] and reward.weights == {"shade": -2.0, "light": 0.0}
    total, parts = reward.score({}, IMAGES, reward.prepare({}, PROMPTS))
    np.testing.assert_array_equal(total, np.full((2, 3), -0.5))
    np.testing.assert_array_equal(parts["light"], np.full((2, 3), 0.5))
