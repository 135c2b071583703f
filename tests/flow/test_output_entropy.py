"""The output entropy, where it is known: a Gaussian and its exact, linear velocity field."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.flow.output_entropy import mean_and_error, output_log_prob

MEAN = jnp.linspace(-1.0, 1.0, 8)


def gaussian_field(std):
    """v of x_t = (1 - sigma) x_0 + sigma eps with x_0 ~ N(MEAN, diag std^2)."""

    def velocity(params, x_t, sigma, conditioning):
        keep = 1.0 - sigma
        slope = (sigma - keep * std**2) / (keep**2 * std**2 + sigma**2)
        return slope * (x_t - keep * MEAN) - MEAN

    return velocity


def entropy(velocity, steps, count=2048, num_probes=1):
    x_1 = jax.random.normal(jax.random.key(0), (count, 8))

    @jax.jit
    def run(x_1):
        return output_log_prob(
            velocity,
            None,
            x_1,
            None,
            sigmas=np.linspace(1.0, 0.0, steps + 1),
            key=jax.random.key(1),
            num_probes=num_probes,
        )

    return run(x_1)


@pytest.mark.parametrize("std", [jnp.full(8, 0.3), jnp.linspace(0.3, 2.0, 8)])
def test_a_gaussians_entropy_comes_out(std):
    exact = float(jnp.mean(0.5 * jnp.log(2 * jnp.pi * jnp.e * std**2)))
    errors = []
    for steps in (50, 200):
        log_prob, x_0 = entropy(gaussian_field(std), steps)
        value, error = mean_and_error(log_prob.reshape(64, 32))
        errors.append(abs(float(value) - exact))
        assert float(error) < 0.01
    # Euler's error is of the first order in the step: four times the steps, a quarter of it; what
    # is left is the sample's own error.
    assert errors[1] < 0.4 * errors[0] + 3 * float(error)
    assert errors[1] < 0.01 + 3 * float(error)
    np.testing.assert_allclose(x_0.std(axis=0), std, rtol=0.06)


def test_the_density_is_that_of_the_sample_it_is_given_for():
    std = jnp.full(8, 0.5)
    log_prob, x_0 = entropy(gaussian_field(std), 400, count=64)
    expected = jnp.mean(
        -0.5 * jnp.square((x_0 - MEAN) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi), axis=-1
    )
    np.testing.assert_allclose(log_prob, expected, atol=0.01)


def test_a_field_that_narrows_lowers_the_entropy():
    """The sign: with v = x the ODE shrinks from sigma 1 to 0 by e, one nat a dimension."""
    x_1 = jax.random.normal(jax.random.key(0), (256, 8))
    log_prob, _ = output_log_prob(
        lambda params, x, sigma, c: x,
        None,
        x_1,
        None,
        sigmas=np.linspace(1.0, 0.0, 101),
        key=jax.random.key(1),
    )
    start = jnp.mean(-0.5 * jnp.square(x_1) - 0.5 * jnp.log(2 * jnp.pi), axis=-1)
    np.testing.assert_allclose(log_prob - start, 1.0, atol=1e-5)


def test_probes_are_exact_on_the_diagonal_and_unbiased_beside_it():
    matrix = np.random.default_rng(0).normal(size=(8, 8)) / 4

    def divergence(probes, matrix, seed):
        log_prob, _ = output_log_prob(
            lambda params, x, sigma, c: x @ jnp.asarray(matrix, jnp.float32),
            None,
            jnp.zeros((512, 8)),
            None,
            sigmas=np.array([1.0, 0.0]),
            key=jax.random.key(seed),
            num_probes=probes,
        )
        return np.asarray(log_prob) + 0.5 * np.log(2 * np.pi)  # = tr / 8

    exact = np.trace(matrix) / 8
    np.testing.assert_allclose(divergence(1, np.diag(np.diag(matrix)), 0), exact, atol=1e-6)
    one, many = divergence(1, matrix, 0), divergence(16, matrix, 1)
    assert abs(one.mean() - exact) < 4 * one.std() / np.sqrt(512)
    # 16 independent probes have a quarter of the spread.
    assert many.std() == pytest.approx(one.std() / 4, rel=0.2)


def test_the_error_is_taken_over_prompts():
    log_prob = jnp.repeat(jnp.asarray([[1.0], [2.0], [4.0]]), 5, axis=1)
    value, error = mean_and_error(log_prob)
    assert float(value) == pytest.approx(-7 / 3)
    assert float(error) == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))


def test_no_probe_is_refused():
    with pytest.raises(ValueError, match="at least one probe"):
        output_log_prob(
            lambda *a: a[1], None, jnp.zeros((2, 3)), None,
            sigmas=np.array([1.0, 0.0]), key=jax.random.key(0), num_probes=0,
        )  # fmt: skip
