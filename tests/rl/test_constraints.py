"""Constraints: rewards, bounds and weights, and that the hooks carry what others will need."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.rl import constraints
from pec_jax.rl.constraints import Constraint, constrained_loss, get_constraint
from pec_jax.rl.losses import policy_loss
from pec_jax.rl.signals import SPACES, Options, Signals, whole_groups

_RNG = np.random.default_rng(0)
REWARDS = jnp.asarray(_RNG.normal(size=(3, 4)) * [[1.0], [0.1], [5.0]], jnp.float32)
SURPRISAL = jnp.asarray(_RNG.normal(size=(3, 4)), jnp.float32)
RATIO = jnp.asarray(np.exp(0.1 * _RNG.normal(size=(3, 4))), jnp.float32)
LOGP = jnp.asarray(_RNG.normal(size=(3, 4)), jnp.float32)
LOGP_OLD = LOGP - jnp.log(RATIO)
ADVANTAGES = jnp.asarray(_RNG.normal(size=(3, 4)), jnp.float32)


def _signals(**changes):
    signals = Signals(
        weight=jnp.float32(0.05),
        rewards=REWARDS,
        surprisal=SURPRISAL,
        logp=LOGP,
        logp_old=LOGP_OLD,
        ratio=RATIO,
        advantages=ADVANTAGES,
        kl=jnp.abs(LOGP),
    )
    signals = signals._replace(**changes)
    space = "latent" if signals.surprisal is None else "perceptual"
    return whole_groups(signals, Options(space=space))


@pytest.mark.parametrize("name", ["none", "kl"])
def test_none_and_kl_leave_the_reward(name):
    shaped = get_constraint(name).shape_reward(_signals(surprisal=None), Options())
    np.testing.assert_array_equal(shaped, REWARDS)


def test_pec_adds_the_weighted_surprisal():
    pec = get_constraint("pec")
    shaped = pec.shape_reward(_signals(), Options())
    np.testing.assert_allclose(shaped, REWARDS + 0.05 * RATIO * SURPRISAL, rtol=1e-6)
    first_update = pec.shape_reward(_signals(ratio=None), Options())
    np.testing.assert_allclose(first_update, REWARDS + 0.05 * SURPRISAL, rtol=1e-6)


def test_pec_in_units_of_the_rewards_std():
    shaped = get_constraint("pec").shape_reward(_signals(ratio=None), Options(unit="reward_std"))
    expected = REWARDS + 0.05 * REWARDS.std(axis=-1, keepdims=True) * SURPRISAL
    np.testing.assert_allclose(shaped, expected, rtol=1e-5, atol=1e-6)


def test_pec_in_reward_std_units_ignores_the_rewards_scale():
    pec, options = get_constraint("pec"), Options(unit="reward_std")
    shaped = pec.shape_reward(_signals(), options)
    scaled = pec.shape_reward(_signals(rewards=10 * REWARDS), options)
    np.testing.assert_allclose(scaled, 10 * shaped, rtol=1e-4, atol=1e-5)


def test_pec_in_the_latent_space_uses_the_policys_own_density():
    shaped = get_constraint("pec").shape_reward(_signals(surprisal=None), Options(space="latent"))
    np.testing.assert_allclose(shaped, REWARDS - 0.05 * RATIO * LOGP, rtol=1e-6)


def test_pec_takes_an_axis_of_steps():
    per_step = jnp.stack([SURPRISAL, 2 * SURPRISAL])
    shaped = get_constraint("pec").shape_reward(_signals(surprisal=per_step), Options())
    np.testing.assert_allclose(shaped[1], REWARDS + 0.1 * RATIO * SURPRISAL, rtol=1e-5, atol=1e-6)


def test_the_bonus_carries_no_gradient_but_the_rewards():
    pec = get_constraint("pec")

    def total(surprisal, ratio, logp):
        signals = _signals(surprisal=surprisal, ratio=ratio, logp=logp)
        return sum(pec.shape_reward(signals, Options(space=s)).sum() for s in SPACES)

    for gradient in jax.grad(total, argnums=(0, 1, 2))(SURPRISAL, RATIO, LOGP):
        np.testing.assert_array_equal(gradient, 0.0)


def test_the_weight_is_traced_and_not_compiled_in():
    shape = jax.jit(lambda w: get_constraint("pec").shape_reward(_signals(weight=w), Options()))
    for weight in (0.0, 0.05, 3.0):
        expected = REWARDS + weight * RATIO * SURPRISAL
        np.testing.assert_allclose(shape(jnp.float32(weight)), expected, rtol=1e-5, atol=1e-6)
    assert shape._cache_size() == 1


@pytest.mark.parametrize("name", ["none", "pec"])
def test_loss_without_extra_term_is_the_policy_loss(name):
    loss, metrics = constrained_loss(get_constraint(name), _signals(), Options(), 0.02, 0.05)
    expected, aux = policy_loss(LOGP, LOGP_OLD, ADVANTAGES, 0.02, 0.05)
    assert float(loss) == float(expected)
    assert {k: float(metrics[k]) for k in aux} == {k: float(v) for k, v in aux.items()}
    assert 0 < float(metrics["clip_fraction"]) < 1
    assert float(metrics["constraint_loss"]) == 0.0


def test_kl_adds_its_weighted_mean_and_trains():
    kl = get_constraint("kl")
    assert kl.needs_reference
    loss, metrics = constrained_loss(kl, _signals(), Options(), 0.1, 0.1)
    expected, _ = policy_loss(LOGP, LOGP_OLD, ADVANTAGES, 0.1, 0.1)
    np.testing.assert_allclose(loss - expected, 0.05 * jnp.abs(LOGP).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["constraint_loss"], 0.05 * jnp.abs(LOGP).mean(), rtol=1e-6)
    gradient = jax.grad(lambda d: constrained_loss(kl, _signals(kl=d), Options(), 0.1, 0.1)[0])(
        jnp.ones((3, 4))
    )
    np.testing.assert_allclose(gradient, 0.05 / 12, rtol=1e-6)


@pytest.mark.parametrize(
    "name", sorted(set(constraints.CONSTRAINTS) - {"clip_higher", "pec_target"})
)
def test_the_weight_stays_and_the_bounds_stay(name):
    constraint = get_constraint(name)
    assert constraint.name == name
    assert constraint.clip_bounds(_signals(), Options(), 0.1, 0.3) == (0.1, 0.3)
    assert float(constraint.update_weight(_signals(), Options())) == np.float32(0.05)


_SELECTED = np.arange(12).reshape(3, 4) % 3 == 0
_PLAIN = -np.asarray(ADVANTAGES) / 12  # REINFORCE
_CENTRED = np.asarray(SURPRISAL) - np.asarray(SURPRISAL).mean(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("none", Options(), _PLAIN),
        ("kl", Options(), _PLAIN),
        ("clip_higher", Options(), _PLAIN),
        ("entropy_reg", Options(), _PLAIN - 0.05 * _CENTRED / 12),
        ("entropy_reg", Options(space="latent", gradient="exact"), _PLAIN),
        ("clip_cov", Options(), np.where(_SELECTED, 0.0, _PLAIN)),
        ("kl_cov", Options(), _PLAIN),
        ("pec", Options(), _PLAIN),
        ("pcvae", Options(), _PLAIN),
        # d/dlogp of r (log p_perc - logp) at r = 1
        ("pcvae", Options(kl_as="loss"), _PLAIN - 0.05 * (SURPRISAL + LOGP + 1) / 12),
        ("pec_target", Options(), _PLAIN),
    ],
)
@pytest.mark.parametrize("clip", [0.0, 1e-4])
def test_the_gradient_in_logp_at_ratio_exactly_one(name, options, expected, clip):
    """At the first update after a rollout nothing is clipped, whatever the clip range."""
    signals = _signals(
        logp_old=LOGP, ratio=None, entropy=jnp.float32(0.3), selected=jnp.asarray(_SELECTED)
    )

    def loss(logp):
        method = get_constraint(name)
        return constrained_loss(method, signals._replace(logp=logp), options, clip, clip)[0]

    # fp32 numbers of size 0.1
    np.testing.assert_allclose(jax.grad(loss)(LOGP), expected, rtol=1e-5, atol=1e-7)


def test_every_hook_reaches_the_loss():
    """A method made of all hooks at once: the interface that later methods rely on."""

    def widen(signals, options, low, high):
        return low, 4 * high

    def mask(signals, options, low, high):
        plain = constraints.clipped_loss(signals, options, low, high)
        return jnp.where(signals.selected, 0.0, plain)

    def bonus(signals, options):
        w = jnp.exp(signals.logp - signals.logp_old)
        return -signals.weight * jnp.mean(w * signals.surprisal)

    def select(signals, options):
        return signals.advantages > jnp.quantile(signals.advantages, 0.8)

    def dual(signals, options):
        return jnp.maximum(0.0, signals.weight + 0.1 * (1.0 - signals.surprisal.mean()))

    method = Constraint(
        "all", clip_bounds=widen, sample_loss=mask, extra_loss=bonus, select=select,
        update_weight=dual,
    )  # fmt: skip
    selected = method.select(_signals(), Options())
    assert 0 < int(selected.sum()) < selected.size
    loss, metrics = constrained_loss(method, _signals(selected=selected), Options(), 0.05, 0.05)
    ratio = np.exp(LOGP - LOGP_OLD)
    per_sample = np.maximum(-ADVANTAGES * ratio, -ADVANTAGES * np.clip(ratio, 0.95, 1.2))
    expected = np.where(selected, 0.0, per_sample).mean() - 0.05 * (ratio * SURPRISAL).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], ((ratio < 0.95) | (ratio > 1.2)).mean())
    new_weight = method.update_weight(_signals(), Options())
    np.testing.assert_allclose(new_weight, 0.05 + 0.1 * (1 - SURPRISAL.mean()), rtol=1e-5)


def test_signals_are_a_pytree():
    doubled = jax.jit(lambda s: jax.tree.map(lambda a: 2 * a, s))(_signals(key=None, kl=None))
    np.testing.assert_allclose(doubled.surprisal, 2 * SURPRISAL)
    assert doubled.kl is None


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"none, kl, .*, pec"):
        get_constraint("entropy")
    with pytest.raises(ValueError, match="perceptual, latent"):
        Options(space="pixel")
    with pytest.raises(ValueError, match="raw, reward_std"):
        Options(unit="nats")


def test_options_are_static():
    assert hash(Options()) == hash(Options())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().space = "latent"
