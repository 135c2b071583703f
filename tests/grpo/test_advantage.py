"""Group advantages: definition, invariances, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.grpo.advantage import group_advantages, probabilities

REWARDS = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


@pytest.mark.parametrize("std", ["group", "global"])
def test_definition(std):
    scale = REWARDS.std(axis=1, keepdims=True) if std == "group" else REWARDS.std()
    expected = (REWARDS - REWARDS.mean(1, keepdims=True)) / (scale + 1e-4)
    np.testing.assert_allclose(group_advantages(REWARDS, std=std), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("std", ["group", "global"])
def test_sum_to_zero_and_ignore_the_prompts_difficulty(std):
    advantages = group_advantages(REWARDS, std=std)
    np.testing.assert_allclose(advantages.sum(-1), 0.0, atol=1e-5)
    if std == "group":
        easier = REWARDS + np.arange(5, dtype=np.float32)[:, None]
        np.testing.assert_allclose(group_advantages(easier, std=std), advantages, atol=1e-4)


def test_group_std_is_one():
    np.testing.assert_allclose(group_advantages(REWARDS).std(-1), 1.0, rtol=1e-3)


def test_given_global_std_is_used():
    advantages = group_advantages(REWARDS, std="global", global_std=2.0)
    expected = (REWARDS - REWARDS.mean(1, keepdims=True)) / 2.0001
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


def test_equal_rewards_give_no_advantage():
    np.testing.assert_array_equal(group_advantages(np.full((2, 4), 0.25)), 0.0)


def test_clipped():
    one_winner = np.zeros((1, 64), np.float32)
    one_winner[0, 0] = 1.0
    assert float(group_advantages(one_winner).max()) == 5.0
    assert float(group_advantages(one_winner, clip=2.0).max()) == 2.0
    assert float(group_advantages(one_winner, clip=100.0).max()) > 7.0


def test_a_leading_axis_of_steps_is_kept_apart():
    stacked = np.stack([REWARDS, 3 * REWARDS + 1])
    for std in ("group", "global"):
        advantages = group_advantages(stacked, std=std)
        for s in range(2):
            one = group_advantages(stacked[s], std=std)
            np.testing.assert_allclose(advantages[s], one, rtol=1e-5, atol=1e-6)


def test_no_gradient():
    gradient = jax.grad(lambda r: (group_advantages(r) ** 3).sum())(jnp.asarray(REWARDS))
    np.testing.assert_array_equal(gradient, 0.0)


def test_refusals():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="group, global"):
        group_advantages(REWARDS, std="batch")
    with pytest.raises(ValueError, match="global_std"):
        group_advantages(REWARDS, std="group", global_std=1.0)


def test_probabilities_are_a_softmax_of_each_group():
    p = probabilities(group_advantages(REWARDS))
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(p.argmax(-1), REWARDS.argmax(-1))
    np.testing.assert_allclose(probabilities(jnp.zeros((2, 4))), 0.25)
