"""The fit R = -a exp(H) + b."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pec_jax.evaluation.fit import exponential_fit

RNG = np.random.default_rng(0)
ENTROPIES = RNG.normal(-0.7, 0.2, size=200)


def test_exact_data_is_recovered():
    fit = exponential_fit(-3.13 * np.exp(ENTROPIES) + 2.35, ENTROPIES)
    assert fit == pytest.approx((3.13, 2.35, 1.0), rel=1e-9)


def test_noise_lowers_r2_as_much_as_it_adds_variance():
    clean = -3.0 * np.exp(ENTROPIES) + 2.0
    noisy = clean + RNG.normal(0, clean.std(), size=200)
    fit = exponential_fit(noisy, ENTROPIES)
    # Equal variance of signal and noise: R^2 near 1/2; its std with 200 points is about 0.05.
    assert fit.r2 == pytest.approx(0.5, abs=0.15)
    assert fit.a == pytest.approx(3.0, rel=0.3)


def test_it_is_numpys_least_squares():
    rewards = RNG.normal(size=200)
    slope, offset = np.polyfit(np.exp(ENTROPIES), rewards, 1)
    fit = exponential_fit(rewards, ENTROPIES)
    assert (fit.a, fit.b) == pytest.approx((-slope, offset), rel=1e-6, abs=1e-9)


def test_numbers_that_are_not_finite_are_left_out():
    rewards, entropies = [1.0, 2.0, math.nan, 4.0, 0.5], [0.0, -1.0, 0.3, math.nan, 0.2]
    expected = exponential_fit([1.0, 2.0, 0.5], [0.0, -1.0, 0.2])
    assert exponential_fit(rewards, entropies) == expected


@pytest.mark.parametrize(
    "rewards, entropies",
    [([1.0, 2.0], [0.0, 1.0]), ([1.0] * 5, [0, 1, 2, 3, 4]), ([1, 2, 3, 4], [0.5] * 4), ([], [])],
)
def test_what_cannot_be_fitted_is_nan(rewards, entropies):
    assert all(math.isnan(value) for value in exponential_fit(rewards, entropies))
