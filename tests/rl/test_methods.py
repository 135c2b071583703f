"""Every method of `CONSTRAINTS`: its value against NumPy, its gradient against a closed form."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.rl import constraints
from pec_jax.rl.constraints import check_options, constrained_loss, get_constraint
from pec_jax.rl.signals import Options, Signals, covariances, whole_groups

RNG = np.random.default_rng(0)
SHAPE = (5, 3, 4)  # S, P, K
REWARDS = RNG.normal(size=SHAPE[1:])
SURPRISAL = RNG.normal(size=SHAPE)
LOG_RATIO = 0.1 * RNG.normal(size=SHAPE)
LOGP = RNG.normal(size=SHAPE)
ADVANTAGES = RNG.normal(size=SHAPE)
KL = np.abs(RNG.normal(size=SHAPE))
WEIGHT, LOW, HIGH = 0.7, 0.05, 0.08
PERCEPTUAL = Options()
LATENT = Options(space="latent")


def signals(**changes):
    """float32 signals of all steps; logp_old makes the ratio exp(LOG_RATIO)."""
    values = {
        "rewards": REWARDS,
        "surprisal": SURPRISAL,
        "logp": LOGP,
        "logp_old": LOGP - LOG_RATIO,
        "ratio": np.exp(LOG_RATIO),
        "advantages": ADVANTAGES,
        "kl": KL,
        "entropy": 0.3,
        "selected": np.zeros(SHAPE, bool),
        "target": 0.5,
        "weight": WEIGHT,
    }
    made = {name: jnp.asarray(np.asarray(v)) for name, v in values.items()}
    made = {k: v if v.dtype == bool else v.astype(jnp.float32) for k, v in made.items()}
    return whole_groups(Signals(**made)._replace(**changes), PERCEPTUAL)


def loss_and_gradient(name, options=PERCEPTUAL, **changes):
    """(loss, d loss / d logp) of one method; logp_old, advantages and ratio are constants."""

    def loss(logp):
        given = whole_groups(signals(logp=logp, **changes), options)
        return constrained_loss(get_constraint(name), given, options, LOW, HIGH)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOGP, jnp.float32))
    return float(value), np.asarray(gradient)


def surrogate(advantages=ADVANTAGES, low=LOW, high=HIGH):
    """PPO's loss of each sample and its derivative in logp."""
    r = np.exp(LOG_RATIO)
    losses = np.maximum(-advantages * r, -advantages * np.clip(r, 1 - low, 1 + high))
    active = ~(((advantages > 0) & (r > 1 + high)) | ((advantages < 0) & (r < 1 - low)))
    return losses, -advantages * r * active


N = np.prod(SHAPE)
# Sums of 60 fp32 numbers of size 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-7}


def test_none():
    value, gradient = loss_and_gradient("none")
    losses, slope = surrogate()
    np.testing.assert_allclose(value, losses.mean(), **CLOSE)
    np.testing.assert_allclose(gradient, slope / N, **CLOSE)


def test_kl_trains_through_the_divergence():
    value, _ = loss_and_gradient("kl")
    np.testing.assert_allclose(value, surrogate()[0].mean() + WEIGHT * KL.mean(), **CLOSE)

    def loss(kl):
        return constrained_loss(get_constraint("kl"), signals(kl=kl), Options(), LOW, HIGH)[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(KL)), WEIGHT / N, **CLOSE)


def test_clip_higher_moves_the_upper_bound_alone():
    options = Options(clip_ratio=2.5)
    value, gradient = loss_and_gradient("clip_higher", options)
    losses, slope = surrogate(high=2.5 * HIGH)
    np.testing.assert_allclose(value, losses.mean(), **CLOSE)
    np.testing.assert_allclose(gradient, slope / N, **CLOSE)
    assert np.abs(slope - surrogate()[1]).max() > 0  # some sample was freed by it


@pytest.mark.parametrize("space", ["latent", "perceptual"])
def test_entropy_reg_is_the_score_functions_gradient(space):
    value, gradient = loss_and_gradient("entropy_reg", Options(space=space))
    s = -LOGP if space == "latent" else SURPRISAL
    centred = s - s.mean(axis=-1, keepdims=True)
    losses, slope = surrogate()
    bonus = np.exp(LOG_RATIO) * centred
    np.testing.assert_allclose(value, (losses - WEIGHT * bonus).mean(), **CLOSE)
    np.testing.assert_allclose(gradient, (slope - WEIGHT * bonus) / N, **CLOSE)


def test_entropy_reg_on_policy_is_reinforce_of_the_surprisal():
    """At ratio 1: -lambda mean (s - mean s) grad logp."""
    plain = loss_and_gradient("none", logp_old=jnp.asarray(LOGP, jnp.float32))[1]
    with_bonus = loss_and_gradient("entropy_reg", logp_old=jnp.asarray(LOGP, jnp.float32))[1]
    centred = SURPRISAL - SURPRISAL.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(with_bonus - plain, -WEIGHT * centred / N, rtol=1e-4, atol=1e-7)


def test_entropy_reg_does_not_depend_on_the_unit_of_the_features():
    """Features c times as large shift all surprisals by log c."""
    shifted = jnp.asarray(SURPRISAL + 3.0, jnp.float32)
    _, gradient = loss_and_gradient("entropy_reg", surprisal=shifted)
    np.testing.assert_allclose(gradient, loss_and_gradient("entropy_reg")[1], rtol=1e-4, atol=1e-7)


def test_entropy_reg_with_the_exact_gradient_changes_nothing_bit_for_bit():
    _, gradient = loss_and_gradient("entropy_reg", Options(space="latent", gradient="exact"))
    np.testing.assert_array_equal(gradient, loss_and_gradient("none")[1])


def test_covariances_are_products_of_deviations_from_the_batchs_means():
    expected = (ADVANTAGES - ADVANTAGES.mean()) * (LOGP - LOGP.mean())
    np.testing.assert_allclose(covariances(signals(), LATENT), expected, rtol=1e-4, atol=1e-6)
    expected = (ADVANTAGES - ADVANTAGES.mean()) * (SURPRISAL.mean() - SURPRISAL)
    np.testing.assert_allclose(covariances(signals(), Options()), expected, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda logp: covariances(signals(logp=logp), LATENT).sum())(
        jnp.asarray(LOGP)
    )
    np.testing.assert_array_equal(gradient, 0.0)


def test_covariances_take_one_surprisal_for_all_steps():
    shared = signals(surprisal=jnp.asarray(SURPRISAL[0]), advantages=jnp.asarray(ADVANTAGES[0]))
    assert covariances(shared, Options()).shape == SHAPE[1:]
    mixed = signals(surprisal=jnp.asarray(SURPRISAL[0]))
    assert covariances(mixed, Options()).shape == SHAPE


def test_clip_cov_picks_a_share_of_the_band():
    options = Options(space="latent", cov_band=(0.5, 0.9), cov_share=0.5)
    many = {
        name: jnp.asarray(RNG.normal(size=(50, 8, 16)), jnp.float32)
        for name in ("advantages", "logp")
    }
    picked = constraints.pick_from_band(signals(key=jax.random.key(0), **many), options)
    values = covariances(signals(**many), options)
    low, high = np.quantile(values, [0.5, 0.9])
    assert ((values >= low) & (values <= high))[picked].all()
    # 2560 fair draws: five standard deviations are 0.05 of them.
    assert float(picked.mean()) == pytest.approx(0.4 * 0.5, abs=0.4 * 0.05)
    again = constraints.pick_from_band(signals(key=jax.random.key(0), **many), options)
    other = constraints.pick_from_band(signals(key=jax.random.key(1), **many), options)
    assert (picked == again).all() and (picked != other).any()


def test_clip_cov_drops_the_loss_of_the_selected():
    selected = RNG.random(SHAPE) < 0.3
    value, gradient = loss_and_gradient("clip_cov", selected=jnp.asarray(selected))
    losses, slope = surrogate()
    np.testing.assert_allclose(value, np.where(selected, 0, losses).mean(), **CLOSE)
    np.testing.assert_allclose(gradient, np.where(selected, 0, slope) / N, **CLOSE)


def test_clip_cov_of_no_share_selects_nothing():
    picked = constraints.pick_from_band(signals(key=jax.random.key(0)), Options(cov_share=0.0))
    assert not picked.any()


def test_kl_cov_picks_the_top():
    picked = np.asarray(constraints.pick_top(signals(), Options(cov_share=0.2)))
    values = np.asarray(covariances(signals(), Options()))
    assert picked.sum() == 12
    assert values[picked].min() > values[~picked].max()
    assert not constraints.pick_top(signals(), Options(cov_share=0.0)).any()
    still = signals(advantages=jnp.zeros(SHAPE))
    assert not constraints.pick_top(still, Options(cov_share=0.2)).any()


def test_kl_cov_penalises_the_selected_and_clips_nothing():
    selected = RNG.random(SHAPE) < 0.3
    value, gradient = loss_and_gradient("kl_cov", selected=jnp.asarray(selected))
    r = np.exp(LOG_RATIO)
    losses = -ADVANTAGES * r + np.where(selected, WEIGHT * np.abs(LOG_RATIO), 0)
    slope = -ADVANTAGES * r + np.where(selected, WEIGHT * np.sign(LOG_RATIO), 0)
    np.testing.assert_allclose(value, losses.mean(), **CLOSE)
    np.testing.assert_allclose(gradient, slope / N, **CLOSE)


def test_kl_covs_penalty_has_no_gradient_on_policy():
    """|x| is flat at 0, as in torch: the penalty acts from the second update on."""
    old = jnp.asarray(LOGP, jnp.float32)
    every = jnp.ones(SHAPE, bool)
    _, gradient = loss_and_gradient("kl_cov", logp_old=old, selected=every)
    np.testing.assert_array_equal(gradient, loss_and_gradient("none", logp_old=old)[1])


@pytest.mark.parametrize("name", ["pec", "pec_target"])
def test_pec_rewards_surprise_without_a_gradient_of_its_own(name):
    shaped = get_constraint(name).shape_reward(signals(), Options())
    np.testing.assert_allclose(
        shaped, REWARDS + WEIGHT * np.exp(LOG_RATIO) * SURPRISAL, rtol=1e-5, atol=1e-6
    )
    _, gradient = loss_and_gradient(name)
    np.testing.assert_array_equal(gradient, loss_and_gradient("none")[1])


def test_pcvae_as_a_reward():
    shaped = get_constraint("pcvae").shape_reward(signals(), Options())
    divergence = np.exp(LOG_RATIO) * (-SURPRISAL - LOGP)
    np.testing.assert_allclose(shaped, REWARDS - WEIGHT * divergence, rtol=1e-5, atol=1e-6)

    def total(logp):
        return get_constraint("pcvae").shape_reward(signals(logp=logp), Options()).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(LOGP)), 0.0)
    assert loss_and_gradient("pcvae")[0] == loss_and_gradient("none")[0]


def test_pcvae_as_a_loss_trains():
    options = Options(kl_as="loss")
    shaped = get_constraint("pcvae").shape_reward(signals(), options)
    np.testing.assert_array_equal(shaped, signals().rewards)
    value, gradient = loss_and_gradient("pcvae", options)
    losses, slope = surrogate()
    r, divergence = np.exp(LOG_RATIO), -SURPRISAL - LOGP
    np.testing.assert_allclose(value, (losses + WEIGHT * r * divergence).mean(), **CLOSE)
    # d/dlogp of r (log p_perc - logp) = r (divergence - 1)
    np.testing.assert_allclose(gradient, (slope + WEIGHT * r * (divergence - 1)) / N, **CLOSE)


def test_the_dual_variable_follows_the_deficit():
    method, options = get_constraint("pec_target"), Options(rate=0.2)
    mean = float(SURPRISAL.mean())
    for target in (mean + 1.0, mean - 1.0):
        moved = method.update_weight(signals(target=jnp.float32(target)), options)
        np.testing.assert_allclose(moved, WEIGHT + 0.2 * (target - mean), rtol=1e-5)
    floor = method.update_weight(signals(target=jnp.float32(mean - 100)), options)
    assert float(floor) == 0.0
    still = method.update_weight(signals(), Options(rate=0.0))
    assert float(still) == np.float32(WEIGHT)
    broken = method.update_weight(signals(surprisal=jnp.full(SHAPE, jnp.nan)), options)
    assert float(broken) == np.float32(WEIGHT)


@pytest.mark.parametrize(
    "name, options",
    [
        ("kl", Options()),
        ("entropy_reg", Options()),
        ("entropy_reg", LATENT),
        ("pec", Options()),
        ("pec", Options(unit="reward_std")),
        ("pcvae", Options()),
        ("pcvae", Options(kl_as="loss")),
        ("pec_target", Options()),
        ("clip_higher", Options(clip_ratio=1.0)),
        ("clip_cov", Options(cov_share=0.0)),
    ],
)
def test_without_weight_every_method_is_none_bit_for_bit(name, options):
    changes = {"weight": jnp.float32(0.0)}
    method = get_constraint(name)
    shaped = method.shape_reward(signals(**changes), options)
    np.testing.assert_array_equal(shaped, jnp.broadcast_to(signals().rewards, shaped.shape))
    if method.select is not None:
        changes["selected"] = method.select(signals(key=jax.random.key(3)), options)
    value, gradient = loss_and_gradient(name, options, **changes)
    expected, expected_gradient = loss_and_gradient("none")
    assert value == expected
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_what_means_nothing_is_refused():
    for name in ("pcvae", "pec_target"):
        with pytest.raises(ValueError, match="means nothing in space 'latent'"):
            check_options(get_constraint(name), LATENT)
    with pytest.raises(ValueError, match="exists in space 'latent' only"):
        check_options(get_constraint("entropy_reg"), Options(gradient="exact"))
    for name in constraints.CONSTRAINTS:
        check_options(get_constraint(name), Options())


@pytest.mark.parametrize("band", [(0.5, 0.5), (0.9, 0.1), (-0.1, 0.5), (0.5, 1.1)])
def test_a_band_is_two_rising_quantiles(band):
    with pytest.raises(ValueError, match="two rising quantiles"):
        Options(cov_band=band)


def test_a_new_method_is_one_function_and_one_line():
    """README's promise: nothing else needs to know of it."""

    def novelty(signals, options):
        return signals.rewards + signals.weight * jnp.abs(signals.surprisal)

    method = constraints.Constraint("novelty", shape_reward=novelty)
    shaped = method.shape_reward(signals(), Options())
    np.testing.assert_allclose(shaped, REWARDS + WEIGHT * np.abs(SURPRISAL), rtol=1e-5)
    loss, _ = constrained_loss(method, signals(), Options(), LOW, HIGH)
    assert float(loss) == loss_and_gradient("none")[0]
    assert dataclasses.replace(method, name="other").shape_reward is novelty
