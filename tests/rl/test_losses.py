"""The policy loss: its gradient on policy, its clipping, its metrics."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.flow.sampler import FlowSampler
from pec_jax.rl.losses import clipped_surrogate, policy_loss
from pec_jax.types import Transition

ADVANTAGES = jnp.asarray([1.5, -0.5, 0.0, -1.0])


def _logp(params):
    """Four steps of a small policy, through the real kernel."""
    keys = jax.random.split(jax.random.key(0), 2)
    x_t, x_next = (jax.random.normal(k, (4, 2, 2, 3)) for k in keys)
    sampler = FlowSampler(np.asarray([1.0, 0.95, 0.0]), "flow_sde", 0.7, (True, True))
    taken = Transition(x_t, x_next, jnp.float32(0.9), jnp.float32(0.85))
    return sampler.log_prob(lambda x, sigma: jnp.tanh(x @ params), taken).logp


PARAMS = jax.random.normal(jax.random.key(1), (3, 3))


@functools.cache
def _reinforce_gradient():
    return jax.jit(jax.grad(lambda p: -jnp.mean(ADVANTAGES * _logp(p))))(PARAMS)


@pytest.mark.parametrize("clip", [0.0, 1e-5, 1e-4, 0.2])
def test_on_policy_gradient_is_reinforce(clip):
    def loss(params):
        logp = _logp(params)
        return policy_loss(logp, jax.lax.stop_gradient(logp), ADVANTAGES, clip, clip)

    (_, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    reinforce = _reinforce_gradient()
    np.testing.assert_allclose(gradient, reinforce, rtol=1e-6, atol=1e-8)
    assert float(jnp.abs(gradient).max()) > 1e-3
    assert float(aux["ratio_max_deviation"]) == 0.0
    assert float(aux["clip_fraction"]) == 0.0


def test_value_is_the_pessimistic_bound():
    ratio = np.array([0.5, 0.9, 1.0, 1.1, 2.0])
    for advantage in (-2.0, 0.5):
        clipped = np.clip(ratio, 1 - 0.2, 1 + 0.3)
        expected = np.maximum(-advantage * ratio, -advantage * clipped)
        losses = clipped_surrogate(jnp.log(ratio), jnp.zeros(5), advantage, 0.2, 0.3)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        loss, _ = policy_loss(jnp.log(ratio), jnp.zeros(5), jnp.full(5, advantage), 0.2, 0.3)
        np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "trains"),
    [(1.4, 1.0, False), (1.4, -1.0, True), (0.6, 1.0, True), (0.6, -1.0, False), (1.1, 1.0, True)],
)
def test_only_steps_that_went_far_enough_stop_training(ratio, advantage, trains):
    gradient = jax.grad(
        lambda logp: policy_loss(logp, jnp.zeros(1), jnp.full(1, advantage), 0.3, 0.3)[0]
    )(jnp.log(jnp.full(1, ratio)))
    np.testing.assert_allclose(gradient, -advantage * ratio if trains else 0.0, rtol=1e-6)


def test_metrics():
    logp = jnp.log(jnp.asarray([1.0, 1.05, 1.5, 0.7]))
    _, aux = policy_loss(logp, jnp.zeros(4), ADVANTAGES, 0.2, 0.4)
    np.testing.assert_allclose(aux["clip_fraction"], 0.5)
    np.testing.assert_allclose(aux["ratio_max_deviation"], 0.5, rtol=1e-6)


def test_nothing_but_logp_is_trained():
    arguments = (jnp.asarray([0.1, -0.2]), jnp.zeros(2), jnp.asarray([1.0, -1.0]))
    gradients = jax.grad(lambda *a: policy_loss(*a, 0.5, 0.5)[0], argnums=(0, 1, 2))(*arguments)
    assert float(jnp.abs(gradients[0]).min()) > 0
    np.testing.assert_array_equal(gradients[1], 0.0)
    np.testing.assert_array_equal(gradients[2], 0.0)
