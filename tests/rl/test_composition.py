"""Constraints that combine: what is off leaves no trace, sums are sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.config import ConfigError
from pec_jax.config.registry import CONSTRAINTS
from pec_jax.rl.composition import Constraints
from pec_jax.rl.update import constrained_loss
from tests.rl.test_constraints import GRPO, LOGP, ON, REWARDS, WEIGHT, loss_and_gradient, signals


def combined(**sections):
    """Several constraints with their options, and their states."""
    built = CONSTRAINTS.build_sections(sections, "config.constraints")
    constraints = Constraints.from_config(built, set(GRPO.provides))
    return constraints, constraints.initial_states()


PEC, KL, HIGHER = (
    {"pec": {"weight": 0.3}},
    {"kl": {"weight": 0.2}},
    {"clip_higher": {"ratio": 1.4}},
)


def test_nothing_is_on_by_default():
    constraints, states = combined()
    assert not list(constraints) and states == {} and constraints.needs == set()
    given = signals()
    np.testing.assert_array_equal(constraints.shaped_rewards(states, given), given.rewards)
    assert constraints.metrics(states, given, {}) == {}


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_each_off_value_is_the_run_without_it(name):
    """Off is not on with a small weight: the constraint is not in the program at all."""
    on = combined(**{name: ON.get(name, {"weight": WEIGHT})})
    assert [c.name for c, _ in on[0]] == [name] and list(on[1]) == [name]
    off = {"clip_higher": {"ratio": 1.0}, "clip_cov": {"share": 0.0}, "pec_target": {"target": 0.0}}
    beside = PEC if name in ("kl", "clip_higher") else KL  # of another one that is on
    constraints, states = combined(**{name: off.get(name, {"weight": 0.0})}, **beside)
    alone, alone_states = combined(**beside)
    assert constraints == alone and states.keys() == alone_states.keys()


def test_bonuses_and_losses_add_up():
    both, states = combined(**PEC, **KL, **HIGHER)
    assert [c.name for c, _ in both] == ["clip_higher", "kl", "pec"]
    assert both.needs == {"kl", "ratio"} and both.clip_bounds(0.1, 0.2) == (0.1, 0.2 * 1.4)
    pec = combined(**PEC)
    np.testing.assert_array_equal(
        both.shaped_rewards(states, signals()), pec[0].shaped_rewards(pec[1], signals())
    )
    assert set(both.extra_losses(states, signals())) == {"kl"}


def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients():
    """loss = policy (with the wider bound) + kl + entropy bonus, each with its own gradient."""
    old = jnp.asarray(LOGP - 0.05, jnp.float32)

    def with_kl_of(logp):  # a divergence that depends on the policy, as the real one does
        return jnp.square(logp - old)

    def gradient(**sections):
        constraints, states = combined(**sections)

        def loss(logp):
            given = signals(logp=logp, kl=with_kl_of(logp))
            return constrained_loss((GRPO, constraints), (states, {}), None, given)[0]

        return np.asarray(jax.grad(loss)(jnp.asarray(LOGP, jnp.float32)), np.float64)

    bonus = {"entropy_reg": {"weight": 0.4}}
    plain, higher = gradient(), gradient(**HIGHER)
    parts = (gradient(**KL) - plain) + (gradient(**bonus) - plain)
    assert np.abs(higher - plain).max() > 0 and np.abs(parts).max() > 1e-3
    # fp32 gradients of size 0.1
    np.testing.assert_allclose(gradient(**HIGHER, **KL, **bonus), higher + parts, atol=1e-7)


@pytest.mark.parametrize(
    "sections, words",
    [
        ({**PEC, "pec_target": {"target": 0.9}}, "exclude each other"),
        ({"clip_cov": {"share": 0.1}, "kl_cov": {"weight": 0.1}}, "exclude each other"),
        ({**HIGHER, "kl_cov": {"weight": 0.1}}, "exclude each other"),
    ],
)
def test_those_that_exclude_each_other_say_so(sections, words):
    with pytest.raises(ConfigError, match=words):
        combined(**sections)


@pytest.mark.parametrize(
    "sections, refused",
    [
        (HIGHER, "ratio"),
        ({"kl_cov": {"weight": 0.1}}, "logp, ratio"),
        ({"pcvae": {"weight": 0.1}}, "logp, ratio"),
        ({"pec": {"weight": 0.1, "space": "latent"}}, "logp"),
        ({"kl": {"weight": 0.1, "form": "flow_grpo"}}, "dt"),
        ({**PEC, **KL}, None),
        ({"pec_target": {"target": 0.9}}, None),
    ],
)
def test_what_an_objective_without_log_probs_cannot_serve_is_refused(sections, refused):
    built = CONSTRAINTS.build_sections(sections, "config.constraints")
    if refused is None:
        assert len(Constraints.from_config(built, {"kl"}).active) == len(sections)
    else:
        with pytest.raises(ConfigError, match=rf"needs {refused} of the policy's steps"):
            Constraints.from_config(built, {"kl"})


def test_metrics_say_how_much_each_bonus_pays():
    constraints, states = combined(**PEC, **KL)
    given = signals(ratio=None)
    found = constraints.metrics(states, given, {})
    bonus = 0.3 * np.asarray(given.surprisal)
    shaped = REWARDS + bonus
    share = bonus.std(axis=-1).mean() / shaped.std(axis=-1).mean()
    np.testing.assert_allclose(found["constraint/pec/share"], share, rtol=1e-5)
    np.testing.assert_allclose(found["constraint/pec/bonus_mean"], bonus.mean(), rtol=1e-4)
    assert float(found["constraint/kl/weight"]) == np.float32(0.2)
    assert "constraint/kl/share" not in found


def test_states_move_by_themselves():
    constraints, states = combined(pec_target={"target": 0.9, "weight": 0.5, "rate": 1.0}, **KL)
    states["pec_target"]["target"] = jnp.float32(0.25)
    after = constraints.next_states(states, jnp.zeros((2, 3)))
    assert float(after["pec_target"]["weight"]) == 0.75
    assert after["kl"] == states["kl"]


def test_pec_alone_has_the_loss_of_its_objective():
    assert loss_and_gradient(combined(**PEC))[0] == loss_and_gradient(combined())[0]
