"""What constraints share: options, importance, surprisals, the weight's unit, covariances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.rl.signals import (
    Options,
    Signals,
    covariances,
    group_weight,
    importance,
    surprisal_in_space,
    whole_groups,
)

RNG = np.random.default_rng(3)
S, P, K = 5, 3, 4
REWARDS = jnp.asarray(RNG.normal(size=(P, K)) * [[1.0], [0.1], [5.0]], jnp.float32)
SURPRISAL = jnp.asarray(RNG.normal(size=(S, P, K)), jnp.float32)
LOGP = jnp.asarray(RNG.normal(size=(S, P, K)), jnp.float32)
ADVANTAGES = jnp.asarray(RNG.normal(size=(S, P, K)), jnp.float32)
PERCEPTUAL, LATENT = Options(), Options(space="latent")
IN_STDS = Options(unit="reward_std")
# fp32 numbers of size 1, after a mean over 60 of them.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def signals(**changes):
    made = Signals(
        weight=jnp.float32(0.5),
        rewards=REWARDS,
        surprisal=SURPRISAL,
        logp=LOGP,
        advantages=ADVANTAGES,
    )
    return whole_groups(made._replace(**changes), PERCEPTUAL)


@pytest.mark.parametrize(
    "field, valid",
    [
        ("space", "perceptual, latent"),
        ("unit", "raw, reward_std"),
        ("kl_as", "reward, loss"),
        ("gradient", "score, exact"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_valid_ones(field, valid):
    with pytest.raises(ValueError, match=f"Unknown constraint {field} 'other'.*{valid}"):
        Options(**{field: "other"})
    for value in valid.split(", "):
        assert getattr(Options(**{field: value}), field) == value


def test_the_widest_band_is_a_band():
    assert Options(cov_band=(0.0, 1.0)).cov_band == (0.0, 1.0)


def test_importance_is_one_before_the_first_update():
    assert float(importance(signals())) == 1.0


def test_importance_is_the_ratio_without_a_gradient():
    ratio = jnp.exp(0.1 * LOGP)
    np.testing.assert_array_equal(importance(signals(ratio=ratio)), ratio)
    gradient = jax.grad(lambda r: importance(signals(ratio=r)).sum())(ratio)
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_latent_surprisal_is_minus_the_log_prob():
    np.testing.assert_array_equal(surprisal_in_space(signals(), PERCEPTUAL), SURPRISAL)
    np.testing.assert_array_equal(surprisal_in_space(signals(), LATENT), -LOGP)


@pytest.mark.parametrize("options", [PERCEPTUAL, LATENT])
def test_surprisals_carry_no_gradient(options):
    def total(surprisal, logp):
        return surprisal_in_space(signals(surprisal=surprisal, logp=logp), options).sum()

    for gradient in jax.grad(total, argnums=(0, 1))(SURPRISAL, LOGP):
        np.testing.assert_array_equal(gradient, 0.0)


def test_a_raw_weight_is_one_number():
    weight = group_weight(signals(), PERCEPTUAL)
    assert weight.shape == () and float(weight) == 0.5


def test_a_weight_in_reward_stds_is_one_number_a_group():
    weight = group_weight(signals(), IN_STDS)
    assert weight.shape == (P, 1)
    np.testing.assert_allclose(weight[:, 0], 0.5 * np.asarray(REWARDS).std(axis=-1), **CLOSE)


def test_a_weight_in_reward_stds_follows_the_scale_and_not_the_offset():
    moved = group_weight(signals(rewards=3 * REWARDS + 7), IN_STDS)
    np.testing.assert_allclose(moved, 3 * group_weight(signals(), IN_STDS), **CLOSE)


def test_a_group_of_equal_rewards_has_no_weight_in_their_stds():
    weight = group_weight(signals(rewards=jnp.ones((P, K))), IN_STDS)
    np.testing.assert_array_equal(weight, 0.0)


def test_the_weights_unit_carries_no_gradient_and_is_finite_where_the_std_is_zero():
    for rewards in (REWARDS, jnp.ones((P, K))):
        gradient = jax.grad(lambda r: group_weight(signals(rewards=r), IN_STDS).sum())(rewards)
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("options", [PERCEPTUAL, LATENT])
def test_what_is_kept_of_whole_groups(options):
    groups = whole_groups(signals(), options).groups
    surprise = np.asarray(surprisal_in_space(signals(), options))
    np.testing.assert_allclose(groups.surprisal_mean[..., 0], surprise.mean(axis=-1), **CLOSE)
    np.testing.assert_allclose(groups.reward_std[:, 0], np.asarray(REWARDS).std(axis=-1), **CLOSE)


@pytest.mark.parametrize("options", [PERCEPTUAL, LATENT])
def test_covariances_average_to_the_covariance(options):
    log_density = -np.asarray(surprisal_in_space(signals(), options), np.float64)
    expected = np.cov(np.ravel(ADVANTAGES), np.ravel(log_density), bias=True)[0, 1]
    np.testing.assert_allclose(covariances(signals(), options).mean(), expected, **CLOSE)


@pytest.mark.parametrize("options", [PERCEPTUAL, LATENT])
def test_covariances_do_not_depend_on_offsets(options):
    shifted = signals(advantages=ADVANTAGES + 3.0, logp=LOGP - 2.0, surprisal=SURPRISAL + 5.0)
    np.testing.assert_allclose(
        covariances(shifted, options), covariances(signals(), options), rtol=1e-4, atol=1e-5
    )


def test_means_are_over_the_whole_batch_and_not_the_group():
    """A group that is all good and all likely has high covariances throughout."""
    advantages = jnp.broadcast_to(jnp.asarray([[1.0], [0.0], [-1.0]]), (S, P, K))
    found = covariances(signals(advantages=advantages, logp=advantages), LATENT)
    np.testing.assert_allclose(found, advantages**2, **CLOSE)


def test_what_is_good_and_likely_lowers_the_entropy_in_either_space():
    good = jnp.asarray([[[2.0, -1.0, -1.0]]])
    likely = signals(advantages=good, logp=good, surprisal=-good)
    for options in (PERCEPTUAL, LATENT):
        found = np.asarray(covariances(likely, options))
        assert found.argmax() == 0 and (found > 0).all()


@pytest.mark.parametrize("options", [PERCEPTUAL, LATENT])
def test_covariances_carry_no_gradient(options):
    def total(surprisal, logp, advantages):
        changed = signals(surprisal=surprisal, logp=logp, advantages=advantages)
        return jnp.square(covariances(changed, options)).sum()

    for gradient in jax.grad(total, argnums=(0, 1, 2))(SURPRISAL, LOGP, ADVANTAGES):
        np.testing.assert_array_equal(gradient, 0.0)
