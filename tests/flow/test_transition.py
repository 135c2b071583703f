"""Transition kernels: golden values, limits, densities and their gradients."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pec_jax.flow import transition
from pec_jax.flow.schedule import sd3_sigmas

SHAPE = (3, 4, 4, 2)
SDE_KERNELS = ["flow_sde", "dance_sde", "cps"]


def _state(seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))


def test_flow_sde_stds_golden():
    golden = [0.7, 0.74296, 0.53615, 0.4459, 0.39179, 0.3528, 0.31907, 0.28201, 0.22536, 0.00628]
    stds = transition.schedule_stds(sd3_sigmas(10), "flow_sde", 0.7)
    np.testing.assert_allclose(stds, golden, atol=5.1e-6)


@pytest.mark.parametrize("step", [0, 3, 8])
def test_flow_sde_is_flow_grpos_step(step):
    """Against the published torch formulation, written out in float64."""
    x, v = _state()
    sigmas = sd3_sigmas(10).astype(np.float64)
    sigma, sigma_next, a = sigmas[step], sigmas[step + 1], 0.7
    dt = sigma_next - sigma
    s = np.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) * a
    x64, v64 = np.asarray(x, np.float64), np.asarray(v, np.float64)
    expected = x64 * (1 + s**2 / (2 * sigma) * dt)
    expected += v64 * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    mean, std = transition.flow_sde(x, v, sigma, sigma_next, noise_level=a, sigma_max=sigmas[1])
    np.testing.assert_allclose(mean, expected, atol=2e-6)
    np.testing.assert_allclose(std, s * np.sqrt(-dt), rtol=2e-6)


@pytest.mark.parametrize("step", [0, 3, 8])
def test_dance_sde_is_dancegrpos_step(step):
    """DanceGRPO writes the drift with the score of x_t; both forms are the same step."""
    x, v = _state(1)
    sigmas = sd3_sigmas(10).astype(np.float64)
    sigma, sigma_next, eta = sigmas[step], sigmas[step + 1], 0.3
    dt = sigma_next - sigma
    x64, v64 = np.asarray(x, np.float64), np.asarray(v, np.float64)
    x_0_hat = x64 - sigma * v64
    score = -(x64 - x_0_hat * (1 - sigma)) / sigma**2
    expected = x64 + dt * v64 - 0.5 * eta**2 * score * dt
    mean, std = transition.dance_sde(x, v, sigma, sigma_next, noise_level=eta, sigma_max=sigmas[1])
    np.testing.assert_allclose(mean, expected, atol=2e-6)
    np.testing.assert_allclose(std, eta * np.sqrt(-dt), rtol=1e-5)


@pytest.mark.parametrize("noise_level", [0.2, 0.7, 1.0])
def test_cps_preserves_the_coefficients(noise_level):
    """Of the ideal velocity eps - x_0: signal (1 - sigma_next), total noise sigma_next."""
    x_0, eps = _state(2)
    sigma, sigma_next = 0.8, 0.5
    x_t = (1 - sigma) * x_0 + sigma * eps
    mean, std = transition.cps(
        x_t, eps - x_0, sigma, sigma_next, noise_level=noise_level, sigma_max=0.9
    )
    np.testing.assert_allclose(std, sigma_next * np.sin(noise_level * np.pi / 2), rtol=1e-6)
    old_noise = (mean - (1 - sigma_next) * x_0) / eps
    kept = np.sqrt(sigma_next**2 - float(std) ** 2)
    np.testing.assert_allclose(old_noise, np.full(SHAPE, kept), atol=2e-5)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_zero_noise_is_the_ode_exactly(name):
    x, v = _state(3)
    sigmas = sd3_sigmas(10)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        kwargs = {"noise_level": 0.0, "sigma_max": sigmas[1]}
        mean, std = transition.get_kernel(name)(x, v, sigma, sigma_next, **kwargs)
        np.testing.assert_array_equal(mean, transition.ode(x, v, sigma, sigma_next)[0])
        assert float(std) == 0.0


def test_zero_noise_cps_is_the_ode():
    # The same step in other terms (x_0^ and x_1^), so equal up to rounding.
    x, v = _state(3)
    mean, std = transition.cps(x, v, 0.8, 0.6, noise_level=0.0, sigma_max=0.9)
    np.testing.assert_allclose(mean, transition.ode(x, v, 0.8, 0.6)[0], atol=1e-6)
    assert float(std) == 0.0


def test_ode_is_diffusers_euler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = sd3_sigmas(10)
    x, v = _state(4)
    for step in range(10):
        expected = scheduler.step(
            torch.tensor(np.asarray(v)), scheduler.timesteps[step], torch.tensor(np.asarray(x))
        ).prev_sample
        x, std = transition.ode(x, v, sigmas[step], sigmas[step + 1])
        np.testing.assert_allclose(x, expected.numpy(), atol=1e-6)
        assert float(std) == 0.0


@pytest.mark.parametrize("name", list(transition.KERNELS))
def test_kernels_compute_in_float32(name):
    x, v = _state(5)
    x16, v16 = x.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    kernel = transition.get_kernel(name)
    kwargs = {"noise_level": 0.7, "sigma_max": 0.96}
    mean, std = kernel(x16, v16, 0.9, 0.8, **kwargs)
    assert mean.dtype == std.dtype == jnp.float32
    wide, _ = kernel(x16.astype(jnp.float32), v16.astype(jnp.float32), 0.9, 0.8, **kwargs)
    np.testing.assert_array_equal(mean, wide)


@pytest.mark.parametrize("name", list(transition.KERNELS))
def test_kernels_take_a_sigma_per_image(name):
    x, v = _state(6)
    kernel = transition.get_kernel(name)
    sigma, sigma_next = np.array([1.0, 0.9, 0.3]), np.array([0.96, 0.5, 0.1])
    kwargs = {"noise_level": 0.7, "sigma_max": 0.96}
    column = (3, 1, 1, 1)
    mean, std = kernel(x, v, sigma.reshape(column), sigma_next.reshape(column), **kwargs)
    assert std.shape == column
    for n in range(3):
        one, one_std = kernel(x[n : n + 1], v[n : n + 1], sigma[n], sigma_next[n], **kwargs)
        np.testing.assert_allclose(mean[n : n + 1], one, atol=1e-6)
        np.testing.assert_allclose(std[n].squeeze(), one_std, rtol=1e-6)


def test_unknown_kernel_lists_the_known_ones():
    with pytest.raises(ValueError, match="flow_sde, dance_sde, cps, ode"):
        transition.get_kernel("ddim")
    assert transition.get_kernel(transition.cps) is transition.cps


def test_log_prob_is_torchs_normal():
    x_next, mean = _state(7)
    std = np.array([0.7, 0.1, 0.006], np.float32).reshape(3, 1, 1, 1)
    normal = torch.distributions.Normal(torch.tensor(np.asarray(mean)), torch.tensor(std))
    expected = normal.log_prob(torch.tensor(np.asarray(x_next))).mean(dim=(1, 2, 3))
    logp = transition.log_prob(x_next, mean, jnp.asarray(std))
    assert logp.shape == (3,)
    np.testing.assert_allclose(logp, expected.numpy(), rtol=1e-5)


def test_kl_is_torchs_and_flow_grpos_leaves_dt_out():
    mean, mean_ref = _state(8)
    std, dt = 0.3, -0.05
    p, q = (
        torch.distributions.Normal(torch.tensor(np.asarray(m)), torch.tensor(std))
        for m in (mean, mean_ref)
    )
    expected = torch.distributions.kl_divergence(p, q).mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(transition.gaussian_kl(mean, mean_ref, std), expected, rtol=1e-5)
    variant = transition.gaussian_kl(mean, mean_ref, std, dt=dt)
    np.testing.assert_allclose(variant, expected * 0.05, rtol=1e-5)


def test_kl_is_the_monte_carlo_mean_of_log_ratios():
    mean, mean_ref = _state(9)
    mean_ref = mean + 0.2 * mean_ref
    std = jnp.float32(0.3)
    noise = jax.random.normal(jax.random.key(0), (4000, *SHAPE))

    def log_ratio(eps):
        x = mean + std * eps
        return transition.log_prob(x, mean, std) - transition.log_prob(x, mean_ref, std)

    ratios = jax.jit(jax.vmap(log_ratio))(noise)  # [4000, N]
    error = 5 * np.std(ratios, axis=0) / np.sqrt(4000)
    kl = transition.gaussian_kl(mean, mean_ref, std)
    assert np.all(np.abs(ratios.mean(0) - kl) < error)
    assert np.all(np.asarray(kl) > 10 * error)  # the comparison could tell it from zero


def test_kl_trains_and_pulls_to_the_reference():
    mean, mean_ref = _state(10)
    gradient = jax.grad(lambda m: transition.gaussian_kl(m, mean_ref, 0.3).sum())(mean)
    size = np.prod(SHAPE[1:])
    np.testing.assert_allclose(gradient, (mean - mean_ref) / (0.3**2 * size), rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(gradient).max()) > 0.1
    at_reference = jax.grad(lambda m: transition.gaussian_kl(m, mean_ref, 0.3).sum())(mean_ref)
    np.testing.assert_array_equal(at_reference, 0.0)


def test_policy_entropy_is_torchs():
    std = np.array([0.7, 0.00628], np.float32)
    expected = torch.distributions.Normal(torch.zeros(2), torch.tensor(std)).entropy().numpy()
    np.testing.assert_allclose(transition.policy_entropy(std), expected, rtol=1e-5)


@pytest.mark.parametrize("name", SDE_KERNELS)
def test_policy_entropy_has_exactly_no_gradient(name):
    x, _ = _state(11)

    def entropy_and_mean(theta):
        velocity = jnp.tanh(theta * x)
        mean, std = transition.get_kernel(name)(
            x, velocity, 0.9, 0.8, noise_level=0.7, sigma_max=0.96
        )
        return transition.policy_entropy(std), mean.sum()

    entropy_gradient, mean_gradient = jax.jit(jax.jacrev(entropy_and_mean))(jnp.float32(0.5))
    assert float(entropy_gradient) == 0.0
    assert abs(float(mean_gradient)) > 1e-3


@pytest.mark.parametrize("name", SDE_KERNELS)
def test_velocity_gains_are_the_log_densitys_gradient(name):
    """At one std of noise, d logp / d v is the gain itself, here by automatic differentiation."""
    sigmas = sd3_sigmas(6)
    gains = transition.velocity_gains(sigmas, name, 0.7)
    x, v = _state()
    for step in range(5):
        kernel = functools.partial(
            transition.get_kernel(name),
            sigma=sigmas[step],
            sigma_next=sigmas[step + 1],
            noise_level=0.7,
            sigma_max=sigmas[1],
        )
        mean, std = kernel(x, v)

        def logp(v, x_next=mean + std, kernel=kernel):
            return jnp.sum(transition.log_prob(x_next, *kernel(x, v)))

        dimensions = np.prod(SHAPE[1:])
        np.testing.assert_allclose(
            jnp.abs(jax.grad(logp)(v)) * dimensions, jnp.full(SHAPE, gains[step]), rtol=2e-4
        )
