"""The output entropy, where it is known: a Gaussian and its exact, linear velocity field."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.flow.likelihood import mean_and_error, output_log_prob

MEAN = jnp.linspace(-1.0, 1.0, 8)


def gaussian_field(std):
    """v of x_t = (1 - sigma) x_0 + sigma eps with x_0 ~ N(MEAN, diag std^2)."""

    def velocity(x_t, sigma):
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
            x_1,
            sigmas=np.linspace(1.0, 0.0, steps + 1),
            key=jax.random.key(1),
            num_probes=num_probes,
        )

    return run(x_1)


NARROW, MIXED = jnp.full(8, 0.3), jnp.linspace(0.3, 2.0, 8)


def gaussian_entropy(std):
    return float(jnp.mean(0.5 * jnp.log(2 * jnp.pi * jnp.e * std**2)))


@pytest.mark.parametrize("std", [NARROW, MIXED])
def test_a_gaussians_entropy_comes_out(std):
    log_prob, x_0 = entropy(gaussian_field(std), 50)
    value, error = mean_and_error(log_prob)
    # log p(x_1) alone is random here, of variance 1 / (2 * 8 dimensions).
    assert float(error) == pytest.approx(np.sqrt(1 / 16 / 2048), rel=0.1)
    # The midpoint rule is off by less than 0.001 at 50 steps.
    assert abs(float(value) - gaussian_entropy(std)) < 0.001 + 4 * float(error)
    # 2048 draws: a relative error of 0.016, four of them.
    np.testing.assert_allclose(x_0.std(axis=0), std, rtol=0.064)


def discretisation_error(std, steps):
    """Of the entropy, without the sample's own: diagonal Jacobians have exact divergences."""
    log_prob, _ = entropy(gaussian_field(std), steps, count=1)
    x_1 = jax.random.normal(jax.random.key(0), (1, 8))
    start = jnp.mean(-0.5 * jnp.square(x_1) - 0.5 * jnp.log(2 * jnp.pi))
    gained = float(start - log_prob[0])
    return gained + 0.5 * np.log(2 * np.pi * np.e) - gaussian_entropy(std)


@pytest.mark.parametrize("std", [NARROW, MIXED])
def test_the_error_is_of_the_second_order_in_the_step(std):
    coarse, middle, fine = (abs(discretisation_error(std, steps)) for steps in (10, 20, 40))
    # A quarter at each halving; at 0.0002 and more, fp32 (1e-6) does not blur it.
    assert coarse / middle == pytest.approx(4, rel=0.15)
    assert middle / fine == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("std", [NARROW, MIXED])
def test_half_as_many_steps_err_less_than_eulers(std):
    """What the midpoint rule is for: 20 steps of two evaluations against 40 of one."""
    sigmas = np.linspace(1.0, 0.0, 41)[:-1, None]
    keep = 1 - sigmas
    slopes = (sigmas - keep * std**2) / (keep**2 * std**2 + sigmas**2)
    eulers = 0.5 * np.log(2 * np.pi * np.e) - float(slopes.mean()) - gaussian_entropy(std)
    assert abs(discretisation_error(std, 20)) < abs(eulers) / 10


def test_the_density_is_that_of_the_sample_it_is_given_for():
    std = jnp.full(8, 0.5)
    log_prob, x_0 = entropy(gaussian_field(std), 100, count=64)
    expected = jnp.mean(
        -0.5 * jnp.square((x_0 - MEAN) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi), axis=-1
    )
    # Second order: 100 steps leave some 1e-4 in the divergence and in x_0's scale, which a
    # sample of three standard deviations shows several times over.
    np.testing.assert_allclose(log_prob, expected, atol=2e-3)


def test_a_field_that_narrows_lowers_the_entropy():
    """The sign: with v = x the ODE shrinks from sigma 1 to 0 by e, one nat a dimension."""
    x_1 = jax.random.normal(jax.random.key(0), (256, 8))
    log_prob, _ = output_log_prob(
        lambda x, sigma: x,
        x_1,
        sigmas=np.linspace(1.0, 0.0, 101),
        key=jax.random.key(1),
    )
    start = jnp.mean(-0.5 * jnp.square(x_1) - 0.5 * jnp.log(2 * jnp.pi), axis=-1)
    np.testing.assert_allclose(log_prob - start, 1.0, atol=1e-5)


def test_probes_are_exact_on_the_diagonal_and_unbiased_beside_it():
    matrix = np.random.default_rng(0).normal(size=(8, 8)) / 4

    def divergence(probes, matrix, seed):
        log_prob, _ = output_log_prob(
            lambda x, sigma: x @ jnp.asarray(matrix, jnp.float32),
            jnp.zeros((512, 8)),
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


def test_ungrouped_samples_are_independent():
    value, error = mean_and_error(jnp.asarray([1.0, 2.0, 4.0]))
    assert float(value) == pytest.approx(-7 / 3)
    assert float(error) == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))


def test_the_error_covers_the_noise_of_the_probes():
    """Equal samples differ by their probes alone, and the error says so."""
    field = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)) / 4, jnp.float32)
    errors = []
    for probes in (1, 16):
        log_prob, _ = output_log_prob(
            lambda x, sigma: x @ field,
            jnp.zeros((512, 8)),
            sigmas=np.array([1.0, 0.5, 0.0]),
            key=jax.random.key(2),
            num_probes=probes,
        )
        value, error = mean_and_error(log_prob)
        errors.append(float(error))
        exact = 0.5 * np.log(2 * np.pi) - float(jnp.trace(field)) / 8
        assert abs(float(value) - exact) < 4 * float(error)
    # 16 probes, a quarter of the spread; a spread of 512 samples is known to some 5%.
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.2)


def test_no_probe_is_refused():
    with pytest.raises(ValueError, match="at least one probe"):
        output_log_prob(
            lambda x, sigma: x, jnp.zeros((2, 3)),
            sigmas=np.array([1.0, 0.0]), key=jax.random.key(0), num_probes=0,
        )  # fmt: skip
