"""Group advantages: definition, invariances, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.rl.advantages import (
    advantages,
    group_advantages,
    group_statistics,
    probabilities,
)

REWARDS = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


@pytest.mark.parametrize("std", ["group", "global"])
def test_definition(std):
    scale = REWARDS.std(axis=1, keepdims=True) if std == "group" else REWARDS.std()
    expected = (REWARDS - REWARDS.mean(1, keepdims=True)) / (scale + 1e-4)
    np.testing.assert_allclose(group_advantages(REWARDS, std=std), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("std", ["group", "global"])
def test_sum_to_zero_and_ignore_the_prompts_difficulty(std):
    found = group_advantages(REWARDS, std=std)
    np.testing.assert_allclose(found.sum(-1), 0.0, atol=1e-5)
    if std == "group":
        easier = REWARDS + np.arange(5, dtype=np.float32)[:, None]
        np.testing.assert_allclose(group_advantages(easier, std=std), found, atol=1e-4)


def test_group_std_is_one():
    np.testing.assert_allclose(group_advantages(REWARDS).std(-1), 1.0, rtol=1e-3)


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_part_of_a_group_has_the_advantages_it_has_in_the_whole(std):
    whole = group_advantages(REWARDS, std=std)
    statistics = group_statistics(REWARDS, std)
    np.testing.assert_array_equal(advantages(REWARDS[:, 2:5], statistics), whole[:, 2:5])


def test_equal_rewards_give_no_advantage():
    np.testing.assert_array_equal(group_advantages(np.full((2, 4), 0.25)), 0.0)


def test_equal_rewards_that_float32_cannot_average_give_no_advantage():
    np.testing.assert_array_equal(group_advantages(np.full((3, 24), 1 / 3, np.float32)), 0.0)


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_large_offset_costs_no_more_than_the_rewards_own_rounding(std):
    rewards = (1e4 + 0.02 * REWARDS).astype(np.float32)
    exact = rewards.astype(np.float64)
    scale = exact.std(axis=1, keepdims=True) if std == "group" else exact.std()
    expected = (exact - exact.mean(1, keepdims=True)) / (scale + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, std=std), expected, atol=1e-4)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_left_out_of_its_group_alone(broken):
    """The others have the advantages that they would have without it, by their group's own std."""
    rewards = REWARDS.copy()
    rewards[1, 3] = broken
    found = np.asarray(group_advantages(rewards))
    assert found[1, 3] == 0.0
    others = np.delete(np.arange(8), 3)
    without = group_advantages(rewards[1:2, others])
    np.testing.assert_allclose(found[1:2, others], without, rtol=1e-5, atol=1e-6)
    untouched = group_advantages(np.delete(REWARDS, 1, axis=0))
    np.testing.assert_array_equal(np.delete(found, 1, axis=0), untouched)


def test_one_broken_reward_of_a_batch_leaves_the_global_std_intact():
    rewards = REWARDS.copy()
    rewards[1, 3] = np.nan
    known = rewards[np.isfinite(rewards)].astype(np.float64)
    expected = (rewards - np.nanmean(rewards, axis=1, keepdims=True)) / (known.std() + 1e-4)
    found = np.asarray(group_advantages(rewards, std="global"))
    np.testing.assert_allclose(found, np.nan_to_num(expected), rtol=1e-4, atol=1e-6)


def test_a_group_of_which_nothing_or_one_image_is_known_teaches_nothing():
    rewards = np.full((2, 4), np.nan, np.float32)
    rewards[1, 2] = 5.0
    np.testing.assert_array_equal(group_advantages(rewards), 0.0)


def test_clipped():
    one_winner = np.zeros((1, 64), np.float32)
    one_winner[0, 0] = 1.0
    assert float(group_advantages(one_winner).max()) == 5.0
    assert float(group_advantages(one_winner, clip=2.0).max()) == 2.0
    assert float(group_advantages(one_winner, clip=100.0).max()) > 7.0


def test_a_leading_axis_of_steps_is_kept_apart():
    stacked = np.stack([REWARDS, 3 * REWARDS + 1])
    for std in ("group", "global"):
        found = group_advantages(stacked, std=std)
        for s in range(2):
            one = group_advantages(stacked[s], std=std)
            np.testing.assert_allclose(found[s], one, rtol=1e-5, atol=1e-6)


def test_no_gradient():
    gradient = jax.grad(lambda r: (group_advantages(r) ** 3).sum())(jnp.asarray(REWARDS))
    np.testing.assert_array_equal(gradient, 0.0)


def test_refusals():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="group, global"):
        group_advantages(REWARDS, std="batch")


def test_probabilities_are_a_softmax_of_each_group():
    p = probabilities(group_advantages(REWARDS))
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(p.argmax(-1), REWARDS.argmax(-1))
    np.testing.assert_allclose(probabilities(jnp.zeros((2, 4))), 0.25)
