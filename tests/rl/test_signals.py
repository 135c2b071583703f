"""What constraints share: importance, surprisals, the weight's unit, covariances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.rl.signals import (
    LATENT,
    PERCEPTUAL,
    Signals,
    covariances,
    importance,
    in_unit,
    mean_surprisal_in,
    surprisal_in,
    whole_groups,
)

RNG = np.random.default_rng(3)
S, P, K = 5, 3, 4
REWARDS = jnp.asarray(RNG.normal(size=(P, K)) * [[1.0], [0.1], [5.0]], jnp.float32)
SURPRISAL = jnp.asarray(RNG.normal(size=(S, P, K)), jnp.float32)
LOGP = jnp.asarray(RNG.normal(size=(S, P, K)), jnp.float32)
ADVANTAGES = jnp.asarray(RNG.normal(size=(S, P, K)), jnp.float32)
WEIGHT = jnp.float32(0.5)
SPACES = (PERCEPTUAL, LATENT)
# fp32 numbers of size 1, after a mean over 60 of them.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def signals(rewards=REWARDS, surprisal=SURPRISAL, logp=LOGP, **changes):
    groups = whole_groups(rewards, surprisal, logp)
    given = {"advantages": ADVANTAGES, **changes}
    return Signals(rewards, surprisal, groups, logp=logp, **given)


def test_importance_is_one_before_the_first_update():
    assert float(importance(signals())) == 1.0


def test_importance_is_the_ratio_without_a_gradient():
    ratio = jnp.exp(0.1 * LOGP)
    np.testing.assert_array_equal(importance(signals(ratio=ratio)), ratio)
    gradient = jax.grad(lambda r: importance(signals(ratio=r)).sum())(ratio)
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_latent_surprisal_is_minus_the_log_prob():
    np.testing.assert_array_equal(surprisal_in(signals(), PERCEPTUAL), SURPRISAL)
    np.testing.assert_array_equal(surprisal_in(signals(), LATENT), -LOGP)


@pytest.mark.parametrize("space", SPACES)
def test_surprisals_carry_no_gradient(space):
    def total(surprisal, logp):
        return surprisal_in(signals(surprisal=surprisal, logp=logp), space).sum()

    for gradient in jax.grad(total, argnums=(0, 1))(SURPRISAL, LOGP):
        np.testing.assert_array_equal(gradient, 0.0)


def test_a_raw_weight_is_one_number():
    assert float(in_unit(WEIGHT, "raw", signals())) == 0.5


def test_a_weight_in_reward_stds_is_one_number_per_group():
    weight = in_unit(WEIGHT, "reward_std", signals())
    assert weight.shape == (P, 1)
    np.testing.assert_allclose(weight[:, 0], 0.5 * np.asarray(REWARDS).std(axis=-1), **CLOSE)
    moved = in_unit(WEIGHT, "reward_std", signals(rewards=3 * REWARDS + 7))
    np.testing.assert_allclose(moved, 3 * weight, **CLOSE)


def test_the_weights_unit_carries_no_gradient_and_is_finite_where_the_std_is_zero():
    for rewards in (REWARDS, jnp.ones((P, K))):
        gradient = jax.grad(lambda r: in_unit(WEIGHT, "reward_std", signals(rewards=r)).sum())(
            rewards
        )
        np.testing.assert_array_equal(gradient, 0.0)
    flat = in_unit(WEIGHT, "reward_std", signals(rewards=jnp.ones((P, K))))
    np.testing.assert_array_equal(flat, 0.0)


@pytest.mark.parametrize("space", SPACES)
def test_what_is_kept_of_whole_groups(space):
    surprise = np.asarray(surprisal_in(signals(), space))
    found = mean_surprisal_in(signals(), space)
    np.testing.assert_allclose(found[..., 0], surprise.mean(axis=-1), **CLOSE)
    std = signals().groups.reward_std[:, 0]
    np.testing.assert_allclose(std, np.asarray(REWARDS).std(axis=-1), **CLOSE)


@pytest.mark.parametrize("space", SPACES)
def test_covariances_average_to_the_covariance_and_do_not_depend_on_offsets(space):
    log_density = -np.asarray(surprisal_in(signals(), space), np.float64)
    expected = np.cov(np.ravel(ADVANTAGES), np.ravel(log_density), bias=True)[0, 1]
    np.testing.assert_allclose(covariances(signals(), space).mean(), expected, **CLOSE)
    shifted = signals(advantages=ADVANTAGES + 3.0, logp=LOGP - 2.0, surprisal=SURPRISAL + 5.0)
    np.testing.assert_allclose(
        covariances(shifted, space), covariances(signals(), space), rtol=1e-4, atol=1e-5
    )


def test_means_are_over_the_whole_batch_and_not_the_group():
    """A group that is all good and all likely has high covariances throughout."""
    advantages = jnp.broadcast_to(jnp.asarray([[1.0], [0.0], [-1.0]]), (S, P, K))
    found = covariances(signals(advantages=advantages, logp=advantages), LATENT)
    np.testing.assert_allclose(found, advantages**2, **CLOSE)


def test_covariances_take_one_surprisal_for_all_steps():
    shared = signals(surprisal=SURPRISAL[0], advantages=ADVANTAGES[0])
    assert covariances(shared, PERCEPTUAL).shape == (P, K)
    assert covariances(signals(surprisal=SURPRISAL[0]), PERCEPTUAL).shape == (S, P, K)


def test_what_is_good_and_likely_lowers_the_entropy_in_either_space():
    good = jnp.broadcast_to(jnp.asarray([2.0, -1.0, -1.0, 0.0]), (S, P, K))
    likely = signals(advantages=good, logp=good, surprisal=-good)
    for space in SPACES:
        found = np.asarray(covariances(likely, space))
        assert (found[..., 0] == found.max()).all() and (found >= 0).all()


@pytest.mark.parametrize("space", SPACES)
def test_covariances_carry_no_gradient(space):
    def total(surprisal, logp, advantages):
        changed = signals(surprisal=surprisal, logp=logp, advantages=advantages)
        return jnp.square(covariances(changed, space)).sum()

    for gradient in jax.grad(total, argnums=(0, 1, 2))(SURPRISAL, LOGP, ADVANTAGES):
        np.testing.assert_array_equal(gradient, 0.0)
