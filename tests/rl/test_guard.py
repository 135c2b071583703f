"""GRPO-Guard's ratio and step weight: against torch, on policy, and in distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pec_jax.flow.schedule import sd3_sigmas
from pec_jax.flow.transition import flow_sde, log_prob, schedule_stds, velocity_gains
from pec_jax.rl.guard import guarded_surrogate, normalised_log_ratio, step_weight
from pec_jax.rl.losses import ratio_metrics

SIGMAS = sd3_sigmas(10)
NOISE_LEVEL = 0.7
SHAPES = [(6, 4, 4, 2), (6, 5, 8), (6, 2, 3, 3, 2)]


def _case(shape, step, drift=0.03, seed=0):
    """A step that the old velocity took, and a velocity that has drifted away from it."""
    rng = np.random.default_rng(seed)
    x_t, v_old, noise, change = (rng.normal(size=shape).astype(np.float32) for _ in range(4))
    mean_old, std = _kernel(x_t, v_old, step)
    x_next = mean_old + std * noise
    advantages = jnp.asarray(rng.normal(size=shape[0]), jnp.float32)
    return x_t, v_old + np.float32(drift) * change, mean_old, x_next, std, advantages


def _kernel(x_t, velocity, step):
    return flow_sde(
        x_t,
        velocity,
        SIGMAS[step],
        SIGMAS[step + 1],
        noise_level=NOISE_LEVEL,
        sigma_max=SIGMAS[1],
    )


def _loss(velocity, case, step, clip):
    x_t, _, mean_old, x_next, std, advantages = case
    mean, _ = _kernel(x_t, velocity, step)
    log_ratio = normalised_log_ratio(x_next, mean, mean_old, std)
    weight = step_weight(SIGMAS[step], SIGMAS[step + 1])
    return jnp.mean(guarded_surrogate(log_ratio, advantages, weight, clip, clip)), log_ratio


def _torch_loss(velocity, case, step, clip):
    """The authors' formulas in float64: densities, bias, product with the std, clip, 1 / dt.

    The bias is each sample's own, as in the paper.
    """
    x_t, _, mean_old, x_next, _, advantages = (
        torch.tensor(np.asarray(a), dtype=torch.float64) for a in case
    )
    sigma, sigma_next, sigma_max = (float(SIGMAS[i]) for i in (step, step + 1, 1))
    dt = sigma_next - sigma
    s = NOISE_LEVEL * (sigma / (1 - (sigma_max if sigma == 1 else sigma))) ** 0.5
    mean = x_t * (1 + s**2 / (2 * sigma) * dt)
    mean = mean + velocity * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    scale = torch.tensor((-dt) ** 0.5 * s, dtype=torch.float64)
    dims = tuple(range(1, x_t.ndim))
    new, old = (
        torch.distributions.Normal(m, scale).log_prob(x_next).mean(dims) for m in (mean, mean_old)
    )
    bias = (mean - mean_old).pow(2).mean(dims) / (2 * scale**2)
    ratio = torch.exp((new - old + bias) * scale)
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean() / -dt
    return loss, (new - old + bias) * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", [0, 4, 8])
@pytest.mark.parametrize("clip", [0.2, 1e-3, 1e-4])
def test_loss_and_gradient_are_the_authors(shape, step, clip):
    case = _case(shape, step)
    (loss, log_ratio), gradient = jax.value_and_grad(_loss, has_aux=True)(case[1], case, step, clip)
    velocity = torch.tensor(case[1], dtype=torch.float64, requires_grad=True)
    expected, expected_log_ratio = _torch_loss(velocity, case, step, clip)
    expected.backward()
    # float32 rounds mean - mean_old to 1e-7 (the means are of order 1); over 36 dimensions and
    # more that averages out to 2e-8. The log-ratios here are of order 1e-4.
    np.testing.assert_allclose(log_ratio, expected_log_ratio.detach(), rtol=1e-5, atol=4e-8)
    np.testing.assert_allclose(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, velocity.grad, rtol=1e-5, atol=1e-7)
    outside = np.abs(np.expm1(expected_log_ratio.detach().numpy())) > clip
    metrics = ratio_metrics(log_ratio, 0.0, clip, clip)
    np.testing.assert_allclose(metrics["clip_fraction"], outside.mean(), atol=1e-6)


def test_cases_above_clip_some_samples_and_not_others():
    fractions = [
        float(ratio_metrics(_loss(c[1], c, step, 0.0)[1], 0.0, clip, clip)["clip_fraction"])
        for step in (0, 4, 8)
        for clip in (0.2, 1e-3, 1e-4)
        for c in [_case(SHAPES[0], step)]
    ]
    assert min(fractions) == 0.0 and any(0 < f < 1 for f in fractions)


def test_identity_with_log_prob():
    """std (logp - logp_old + bias), by the kernels' own density."""
    x_t, velocity, mean_old, x_next, std, _ = _case(SHAPES[0], 4, drift=1.0)
    mean, _ = _kernel(x_t, velocity, 4)
    bias = jnp.mean(jnp.square(mean - mean_old), axis=(1, 2, 3)) / (2 * std**2)
    by_density = std * (log_prob(x_next, mean, std) - log_prob(x_next, mean_old, std) + bias)
    np.testing.assert_allclose(
        normalised_log_ratio(x_next, mean, mean_old, std), by_density, atol=1e-6
    )


@pytest.mark.parametrize("clip", [0.0, 2e-6, 0.2])
@pytest.mark.parametrize("step", [0, 4, 8])
def test_on_policy_it_is_exactly_reinforce_times_the_std(clip, step):
    x_t, velocity, _, x_next, std, advantages = _case(SHAPES[0], step)
    weight = step_weight(SIGMAS[step], SIGMAS[step + 1])

    def guard(v):
        mean, _ = _kernel(x_t, v, step)
        log_ratio = normalised_log_ratio(x_next, mean, jax.lax.stop_gradient(mean), std)
        return jnp.mean(guarded_surrogate(log_ratio, advantages, weight, clip, clip)), log_ratio

    def reinforce(v):
        return (
            -weight * std * jnp.mean(advantages * log_prob(x_next, _kernel(x_t, v, step)[0], std))
        )

    gradient, log_ratio = jax.grad(guard, has_aux=True)(velocity)
    expected = jax.grad(reinforce)(velocity)
    np.testing.assert_array_equal(log_ratio, 0.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert float(jnp.abs(expected).max()) > 1e-3
    metrics = ratio_metrics(log_ratio, 0.0, clip, clip)
    assert float(metrics["ratio_max_deviation"]) == 0.0
    assert float(metrics["clip_fraction"]) == 0.0


@pytest.mark.parametrize("std", [0.05, 0.7])
def test_under_the_old_policy_the_ratio_is_centred_and_its_spread_knows_no_std(std):
    """Monte Carlo over 200,000 steps; the plain log-ratio is biased by -|dmu|^2 / (2 std^2)."""
    count, dims = 200_000, 8
    rng = np.random.default_rng(1)
    shift = jnp.asarray(0.1 * rng.normal(size=dims), jnp.float32)
    mean_old = jnp.zeros((count, dims))
    x_next = std * jnp.asarray(rng.normal(size=(count, dims)), jnp.float32)
    normalised = normalised_log_ratio(x_next, mean_old + shift, mean_old, jnp.float32(std))
    plain = log_prob(x_next, mean_old + shift, std) - log_prob(x_next, mean_old, std)
    square = float(jnp.mean(jnp.square(shift)))
    spread = (square / dims) ** 0.5
    standard_error = spread / count**0.5
    assert abs(float(jnp.mean(normalised))) < 4 * standard_error
    # The std of n Gaussian draws has a relative error of 1 / sqrt(2 n) = 0.16 %.
    np.testing.assert_allclose(jnp.std(normalised), spread, rtol=0.007)
    bias = -square / (2 * std**2)
    assert abs(float(jnp.mean(plain)) - bias) < 4 * standard_error / std
    assert bias < -10 * standard_error / std


def test_the_weight_makes_the_gradients_scale_the_same_at_every_step():
    """d mean / d v is dt (1 + a^2 / 2) for sigma < 1; the weight takes dt out."""
    norms = []
    for step in range(1, 9):
        x_t, velocity, _, _, std, advantages = _case(SHAPES[0], step, seed=3)
        weight = step_weight(SIGMAS[step], SIGMAS[step + 1])

        def loss(v, x_t=x_t, std=std, advantages=advantages, weight=weight, step=step):
            mean, _ = _kernel(x_t, v, step)
            old = jax.lax.stop_gradient(mean)
            noise = jax.random.normal(jax.random.key(0), SHAPES[0])
            log_ratio = normalised_log_ratio(old + std * noise, mean, old, std)
            return jnp.mean(guarded_surrogate(log_ratio, advantages, weight, 0.2, 0.2))

        norms.append(float(jnp.linalg.norm(jax.grad(loss)(velocity))))
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


def test_step_weights_golden():
    np.testing.assert_allclose(
        step_weight(np.array([1.0, 0.9, 0.1]), np.array([0.9, 0.5, 0.0])), [10, 2.5, 10], rtol=1e-6
    )


def test_nothing_but_the_mean_carries_a_gradient():
    x_t, velocity, mean_old, x_next, std, _ = _case(SHAPES[0], 4)
    mean, _ = _kernel(x_t, velocity, 4)
    gradients = jax.grad(lambda *a: jnp.sum(normalised_log_ratio(*a)), argnums=(0, 1, 2, 3))(
        x_next, mean, mean_old, std
    )
    assert [bool(jnp.any(g != 0)) for g in gradients] == [False, True, False, False]


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_no_step_drowns_the_others(name):
    """Of the normalised log-ratio a step's gain loses its std, and the weight takes its dt."""
    sigmas = sd3_sigmas(10)
    gains = velocity_gains(sigmas, name, 0.7)[:-1] * schedule_stds(sigmas, name, 0.7)[:-1]
    gains = gains * step_weight(jnp.asarray(sigmas[:-2]), jnp.asarray(sigmas[1:-1]))
    assert float(jnp.max(gains) / jnp.min(gains)) < 3
