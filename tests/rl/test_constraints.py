"""Every constraint: its value against NumPy, its gradient against a closed form."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.config import ConfigError
from pec_jax.config.registry import CONSTRAINTS, OBJECTIVES
from pec_jax.rl.composition import Constraints
from pec_jax.rl.constraint import Constraint, register, weight_field
from pec_jax.rl.constraints.clip_cov import ClipCovOptions, pick_from_band
from pec_jax.rl.constraints.kl_cov import KlCovOptions, pick_top
from pec_jax.rl.constraints.pec_target import PecTargetOptions, follow_target
from pec_jax.rl.signals import Signals, covariances, whole_groups
from pec_jax.rl.update import constrained_loss

RNG = np.random.default_rng(0)
SHAPE = (5, 3, 4)  # S, P, K
REWARDS = RNG.normal(size=SHAPE[1:])
SURPRISAL = RNG.normal(size=SHAPE)
LOG_RATIO = 0.1 * RNG.normal(size=SHAPE)
LOGP = RNG.normal(size=SHAPE)
ADVANTAGES = RNG.normal(size=SHAPE)
KL = np.abs(RNG.normal(size=SHAPE))
WEIGHT, LOW, HIGH = 0.7, 0.05, 0.08
GRPO = OBJECTIVES["grpo"].make(OBJECTIVES["grpo"].options(clip_low=LOW, clip_high=HIGH))
# What turns each one on.
ON = {
    "clip_cov": {"share": 0.2},
    "clip_higher": {"ratio": 2.5},
    "pec_target": {"target": 0.9, "weight": WEIGHT},
}


def method(name, **options):
    """The set in which one constraint is on, and its state."""
    given = {**ON.get(name, {"weight": WEIGHT}), **options}
    sections = {name: CONSTRAINTS[name].options(**given)}
    constraints = Constraints.from_config(sections, set(GRPO.provides))
    return constraints, constraints.initial_states()


NONE = Constraints(()), {}
KEY = jax.random.key(0)


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
        "dt": -0.1,
        "entropy": 0.3,
    }
    made = {name: jnp.asarray(np.asarray(v), jnp.float32) for name, v in values.items()}
    made |= changes
    groups = whole_groups(made["rewards"], made["surprisal"], made["logp"])
    return Signals(**made, groups=groups)


def loss_and_gradient(on, selected=None, **changes):
    """(loss, d loss / d logp); logp_old, advantages and ratio are constants."""
    constraints, states = on
    marked = {} if selected is None else {c.name: jnp.asarray(selected) for c, _ in constraints}

    def loss(logp):
        given = signals(logp=logp, **changes)
        return constrained_loss((GRPO, constraints), (states, marked), None, given)[0]

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


def test_without_constraints_the_loss_is_the_objectives():
    value, gradient = loss_and_gradient(NONE)
    losses, slope = surrogate()
    np.testing.assert_allclose(value, losses.mean(), **CLOSE)
    np.testing.assert_allclose(gradient, slope / N, **CLOSE)


def test_kl_trains_through_the_divergence():
    value, _ = loss_and_gradient(method("kl"))
    np.testing.assert_allclose(value, surrogate()[0].mean() + WEIGHT * KL.mean(), **CLOSE)
    constraints, states = method("kl")

    def loss(kl):
        return constrained_loss((GRPO, constraints), (states, {}), None, signals(kl=kl))[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(KL)), WEIGHT / N, **CLOSE)


def test_flow_grpos_kl_leaves_dt_out_of_the_variance():
    value, _ = loss_and_gradient(method("kl", form="flow_grpo"))
    np.testing.assert_allclose(value, surrogate()[0].mean() + WEIGHT * 0.1 * KL.mean(), **CLOSE)


def test_clip_higher_moves_the_upper_bound_alone():
    value, gradient = loss_and_gradient(method("clip_higher", ratio=2.5))
    losses, slope = surrogate(high=2.5 * HIGH)
    np.testing.assert_allclose(value, losses.mean(), **CLOSE)
    np.testing.assert_allclose(gradient, slope / N, **CLOSE)
    assert np.abs(slope - surrogate()[1]).max() > 0  # some sample was freed by it


@pytest.mark.parametrize("space", ["latent", "perceptual"])
def test_entropy_reg_is_the_score_functions_gradient(space):
    value, gradient = loss_and_gradient(method("entropy_reg", space=space))
    s = -LOGP if space == "latent" else SURPRISAL
    centred = s - s.mean(axis=-1, keepdims=True)
    losses, slope = surrogate()
    bonus = np.exp(LOG_RATIO) * centred
    np.testing.assert_allclose(value, (losses - WEIGHT * bonus).mean(), **CLOSE)
    np.testing.assert_allclose(gradient, (slope - WEIGHT * bonus) / N, **CLOSE)


def test_entropy_reg_on_policy_is_reinforce_of_the_surprisal():
    """At ratio 1: -lambda mean (s - mean s) grad logp, whatever the features' unit."""
    on_policy = {"logp_old": jnp.asarray(LOGP, jnp.float32)}
    plain = loss_and_gradient(NONE, **on_policy)[1]
    centred = SURPRISAL - SURPRISAL.mean(axis=-1, keepdims=True)
    for shift in (0.0, 3.0):  # features c times as large shift all surprisals by log c
        on_policy["surprisal"] = jnp.asarray(SURPRISAL + shift, jnp.float32)
        with_bonus = loss_and_gradient(method("entropy_reg"), **on_policy)[1]
        np.testing.assert_allclose(with_bonus - plain, -WEIGHT * centred / N, rtol=1e-4, atol=1e-7)


def test_entropy_reg_with_the_exact_gradient_changes_nothing_bit_for_bit():
    exact = method("entropy_reg", space="latent", gradient="exact")
    np.testing.assert_array_equal(loss_and_gradient(exact)[1], loss_and_gradient(NONE)[1])


def test_clip_cov_picks_a_share_of_the_band():
    options = ClipCovOptions(space="latent", band=(0.5, 0.9), share=0.5)
    many = {
        name: jnp.asarray(RNG.normal(size=(50, 8, 16)), jnp.float32)
        for name in ("advantages", "logp", "surprisal")
    }
    many["rewards"] = many["surprisal"][0]
    picked = pick_from_band(options, signals(**many), jax.random.key(0))
    values = covariances(signals(**many), "latent")
    low, high = np.quantile(values, [0.5, 0.9])
    assert ((values >= low) & (values <= high))[picked].all()
    # 2560 fair draws: five standard deviations are 0.05 of them.
    assert float(picked.mean()) == pytest.approx(0.4 * 0.5, abs=0.4 * 0.05)
    again = pick_from_band(options, signals(**many), jax.random.key(0))
    other = pick_from_band(options, signals(**many), jax.random.key(1))
    assert (picked == again).all() and (picked != other).any()


def test_clip_cov_drops_the_loss_of_the_selected():
    selected = RNG.random(SHAPE) < 0.3
    value, gradient = loss_and_gradient(method("clip_cov"), selected)
    losses, slope = surrogate()
    np.testing.assert_allclose(value, np.where(selected, 0, losses).mean(), **CLOSE)
    np.testing.assert_allclose(gradient, np.where(selected, 0, slope) / N, **CLOSE)


def test_kl_cov_picks_the_top():
    picked = np.asarray(pick_top(KlCovOptions(share=0.2), signals(), KEY))
    values = np.asarray(covariances(signals(), "perceptual"))
    assert picked.sum() == 12
    assert values[picked].min() > values[~picked].max()
    assert not pick_top(KlCovOptions(share=0.0), signals(), KEY).any()
    assert not pick_top(KlCovOptions(share=0.2), signals(advantages=jnp.zeros(SHAPE)), KEY).any()


def test_kl_cov_penalises_the_selected_and_clips_nothing():
    selected = RNG.random(SHAPE) < 0.3
    value, gradient = loss_and_gradient(method("kl_cov"), selected)
    r = np.exp(LOG_RATIO)
    losses = -ADVANTAGES * r + np.where(selected, WEIGHT * np.abs(LOG_RATIO), 0)
    slope = -ADVANTAGES * r + np.where(selected, WEIGHT * np.sign(LOG_RATIO), 0)
    np.testing.assert_allclose(value, losses.mean(), **CLOSE)
    np.testing.assert_allclose(gradient, slope / N, **CLOSE)


def test_kl_covs_penalty_has_no_gradient_on_policy():
    """|x| is flat at 0, as in torch: the penalty acts from the second update on."""
    old = jnp.asarray(LOGP, jnp.float32)
    _, gradient = loss_and_gradient(method("kl_cov"), np.ones(SHAPE, bool), logp_old=old)
    np.testing.assert_array_equal(gradient, loss_and_gradient(NONE, logp_old=old)[1])


@pytest.mark.parametrize("name", ["pec", "pec_target"])
def test_pec_rewards_surprise_without_a_gradient_of_its_own(name):
    constraints, states = method(name)
    shaped = constraints.shaped_rewards(states, signals())
    np.testing.assert_allclose(
        shaped, REWARDS + WEIGHT * np.exp(LOG_RATIO) * SURPRISAL, rtol=1e-5, atol=1e-6
    )
    first = constraints.shaped_rewards(states, signals(ratio=None))
    np.testing.assert_allclose(first, REWARDS + WEIGHT * SURPRISAL, rtol=1e-5, atol=1e-6)
    gradient = loss_and_gradient((constraints, states))[1]
    np.testing.assert_array_equal(gradient, loss_and_gradient(NONE)[1])

    def total(surprisal, ratio, logp):
        given = signals(surprisal=surprisal, ratio=ratio, logp=logp)
        return constraints.shaped_rewards(states, given).sum()

    arguments = (jnp.asarray(a, jnp.float32) for a in (SURPRISAL, np.exp(LOG_RATIO), LOGP))
    for gradient in jax.grad(total, argnums=(0, 1, 2))(*arguments):
        np.testing.assert_array_equal(gradient, 0.0)


def test_pec_in_units_of_the_rewards_std_follows_their_scale():
    constraints, states = method("pec", unit="reward_std")
    shaped = constraints.shaped_rewards(states, signals(ratio=None))
    expected = REWARDS + WEIGHT * REWARDS.std(axis=-1, keepdims=True) * SURPRISAL
    np.testing.assert_allclose(shaped, expected, rtol=1e-5, atol=1e-6)
    tenfold = signals(rewards=jnp.asarray(10 * REWARDS, jnp.float32), ratio=None)
    scaled = constraints.shaped_rewards(states, tenfold)
    np.testing.assert_allclose(scaled, 10 * shaped, rtol=1e-4, atol=1e-5)


def test_pec_in_the_latent_space_uses_the_policys_own_density():
    constraints, states = method("pec", space="latent")
    shaped = constraints.shaped_rewards(states, signals())
    expected = REWARDS - WEIGHT * np.exp(LOG_RATIO) * LOGP
    np.testing.assert_allclose(shaped, expected, rtol=1e-5, atol=1e-6)


def test_pcvae_as_a_reward():
    constraints, states = method("pcvae")
    shaped = constraints.shaped_rewards(states, signals())
    divergence = np.exp(LOG_RATIO) * (-SURPRISAL - LOGP)
    np.testing.assert_allclose(shaped, REWARDS - WEIGHT * divergence, rtol=1e-5, atol=1e-6)

    def total(logp):
        return constraints.shaped_rewards(states, signals(logp=logp)).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(LOGP)), 0.0)
    assert loss_and_gradient((constraints, states))[0] == loss_and_gradient(NONE)[0]


def test_pcvae_as_a_loss_trains():
    on = method("pcvae", kl_as="loss")
    np.testing.assert_array_equal(on[0].shaped_rewards(on[1], signals()), signals().rewards)
    value, gradient = loss_and_gradient(on)
    losses, slope = surrogate()
    r, divergence = np.exp(LOG_RATIO), -SURPRISAL - LOGP
    np.testing.assert_allclose(value, (losses + WEIGHT * r * divergence).mean(), **CLOSE)
    # d/dlogp of r (log p_perc - logp) = r (divergence - 1)
    np.testing.assert_allclose(gradient, (slope + WEIGHT * r * (divergence - 1)) / N, **CLOSE)


def test_the_dual_variable_follows_the_deficit():
    mean, options = jnp.float32(0.3), PecTargetOptions(rate=0.2)

    def moved(target, mean=mean, options=options):
        state = {"weight": jnp.float32(WEIGHT), "target": jnp.float32(target)}
        return float(follow_target(options, state, jnp.float32(mean))["weight"])

    for target in (1.3, -0.7):
        assert moved(target) == pytest.approx(WEIGHT + 0.2 * (target - 0.3), rel=1e-5)
    assert moved(-100.0) == 0.0
    assert moved(1.0, options=PecTargetOptions(rate=0.0)) == np.float32(WEIGHT)
    for broken in (np.nan, np.inf, -np.inf):  # one image that is not finite teaches nothing
        assert moved(1.0, broken) == np.float32(WEIGHT)


# Whatever the clip range, nothing is clipped at the first update after a rollout.
_SELECTED = np.arange(N).reshape(SHAPE) % 3 == 0
_PLAIN = -ADVANTAGES / N  # REINFORCE
_CENTRED = SURPRISAL - SURPRISAL.mean(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "on, expected",
    [
        (NONE, _PLAIN),
        (method("kl"), _PLAIN),
        (method("clip_higher"), _PLAIN),
        (method("entropy_reg"), _PLAIN - WEIGHT * _CENTRED / N),
        (method("clip_cov"), np.where(_SELECTED, 0.0, _PLAIN)),
        (method("kl_cov"), _PLAIN),
        (method("pec"), _PLAIN),
        (method("pcvae"), _PLAIN),
        (method("pcvae", kl_as="loss"), _PLAIN - WEIGHT * (SURPRISAL + LOGP + 1) / N),
    ],
)
def test_the_gradient_in_logp_at_ratio_exactly_one(on, expected):
    logp = jnp.asarray(LOGP, jnp.float32)
    _, gradient = loss_and_gradient(on, _SELECTED, logp_old=logp, ratio=None)
    # fp32 numbers of size 0.1
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_the_weight_is_traced_and_not_compiled_in():
    constraints, _ = method("pec")
    shape = jax.jit(lambda w: constraints.shaped_rewards({"pec": {"weight": w}}, signals()))
    for weight in (0.0, 0.05, 3.0):
        expected = REWARDS + weight * np.exp(LOG_RATIO) * SURPRISAL
        np.testing.assert_allclose(shape(jnp.float32(weight)), expected, rtol=1e-5, atol=1e-6)
    assert shape._cache_size() == 1


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("entropy_reg", {"gradient": "exact"}, "in space 'latent' only"),
        ("clip_cov", {"band": (0.5, 0.5)}, "two rising quantiles"),
        ("clip_cov", {"band": (-0.1, 0.5)}, "two rising quantiles"),
        ("clip_cov", {"band": (0.5, 1.1)}, "two rising quantiles"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, words):
    with pytest.raises(ConfigError, match=words):
        CONSTRAINTS[name].options(**options)


def test_a_new_constraint_is_one_function_and_one_definition():
    """The promise of `rl.constraint`: nothing else needs to know of it."""

    @dataclasses.dataclass(frozen=True)
    class NoveltyOptions:
        weight: float = weight_field()

    def novelty(options, state, signals):
        return state["weight"] * jnp.abs(signals.surprisal)

    register(Constraint(name="novelty", label="Novelty", options=NoveltyOptions, bonus=novelty))
    try:
        sections = CONSTRAINTS.build_sections({"novelty": {"weight": 0.5}}, "config.constraints")
        constraints = Constraints.from_config(sections, set(GRPO.provides))
        shaped = constraints.shaped_rewards(constraints.initial_states(), signals())
        np.testing.assert_allclose(shaped, REWARDS + 0.5 * np.abs(SURPRISAL), rtol=1e-5)
    finally:
        CONSTRAINTS._entries.pop("novelty")
