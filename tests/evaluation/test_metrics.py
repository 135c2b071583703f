"""Diversity measures against other packages and cases known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import pdist
from vendi_score import vendi

from pec_jax.evaluation import metrics


def _features(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_frechet_distance_of_commuting_gaussians():
    """Closed form: |m - m'|^2 + |s - s'|^2 for independent dimensions of std s and s'."""
    rotation = np.linalg.qr(_features(4, 4))[0]
    s, other_s = np.array([1.0, 2.0, 0.5, 0.0]), np.array([2.0, 2.0, 1.0, 0.3])
    mean, other_mean = _features(2, 4, seed=1)
    one = metrics.Moments(mean, rotation * s**2 @ rotation.T)
    other = metrics.Moments(other_mean, rotation * other_s**2 @ rotation.T)
    expected = np.sum((mean - other_mean) ** 2) + np.sum((s - other_s) ** 2)
    assert metrics.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_that_of_scipys_matrix_root():
    """Of covariances that do not commute; the usual formula has tr (C C')^1/2."""
    one, other = (metrics.moments(_features(50, 3, 8, seed=i) * (1 + i)) for i in (1, 2))
    root = scipy.linalg.sqrtm(one.covariance @ other.covariance).real
    shift = np.sum((one.mean - other.mean) ** 2)
    expected = shift + np.trace(one.covariance + other.covariance - 2 * root)
    assert metrics.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(one, one) == pytest.approx(0.0, abs=1e-6)


def test_moments_are_of_all_images():
    f = _features(5, 4, 3)
    found = metrics.moments(f)
    np.testing.assert_allclose(found.mean, f.reshape(20, 3).mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(f.reshape(20, 3).T))


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_mean_pairwise_distance_is_scipys(metric):
    f = _features(3, 7, 5)
    expected = [pdist(group, metric).mean() for group in f]
    np.testing.assert_allclose(metrics.mean_pairwise_distance(f, metric), expected, rtol=1e-10)


def test_identical_images_are_at_distance_zero():
    assert metrics.mean_pairwise_distance(np.ones((4, 3))) == 0.0
    two = np.array([[0.0, 0.0], [3.0, 4.0]])
    assert metrics.mean_pairwise_distance(two) == 5.0


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_vendi_is_the_packages(shape):
    f = _features(*shape) + 0.5
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    np.testing.assert_allclose(metrics.vendi_score(f), vendi.score_K(unit @ unit.T), rtol=1e-6)


def test_vendi_counts_different_images():
    np.testing.assert_allclose(metrics.vendi_score(np.ones((5, 3))), 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.vendi_score(3 * np.eye(5)), 5.0)
    pairs = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    np.testing.assert_allclose(metrics.vendi_score(pairs), 3.0)


def test_vendi_is_per_prompt():
    f = _features(2, 3, 4, 6)
    scores = metrics.vendi_score(f)
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(scores[1, 2], metrics.vendi_score(f[1, 2]))


def test_colour_histogram_entropy():
    labels = np.array(
        [
            [0, 1, 2, 3],  # all different
            [5, 5, 5, 5],  # collapsed
            [0, 0, 1, 1],
            [0, 1, -1, -1],  # two without an object
            [-1, -1, -1, -1],
        ]
    )
    expected = [math.log(4), 0.0, math.log(2), math.log(2), 0.0]
    entropies = metrics.colour_histogram_entropy(labels, 8)
    np.testing.assert_allclose(entropies, expected, atol=1e-12)


def test_colour_histogram_entropy_is_the_multinomials():
    labels = np.repeat(np.arange(3), [5, 3, 2])
    p = np.array([0.5, 0.3, 0.2])
    result = metrics.colour_histogram_entropy(labels, 3)
    np.testing.assert_allclose(result, -(p * np.log(p)).sum())


def test_bootstrap_interval_is_that_of_a_mean():
    values = _features(400, seed=1) * 2 + 3
    interval = metrics.bootstrap_interval(values, seed=0)
    assert interval.value == values.mean()
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(interval.low, values.mean() - half, atol=0.1 * half)
    np.testing.assert_allclose(interval.high, values.mean() + half, atol=0.1 * half)


def test_bootstrap_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(size=40)
        interval = metrics.bootstrap_interval(values, seed=seed, level=0.8, num_resamples=300)
        covered += interval.low <= 0.0 <= interval.high
    assert 0.7 < covered / 200 < 0.88


def test_bootstrap_is_seeded_and_takes_other_statistics():
    values = np.append(np.zeros(50), 1000.0)
    by_seed = [metrics.bootstrap_interval(_features(30), seed=seed) for seed in (3, 3, 4)]
    assert by_seed[0] == by_seed[1] != by_seed[2]
    median = metrics.bootstrap_interval(values, seed=3, statistic=np.median)
    assert median == (0.0, 0.0, 0.0)
    wide = metrics.bootstrap_interval(_features(30), seed=3, level=0.99)
    narrow = metrics.bootstrap_interval(_features(30), seed=3, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_refusals():
    with pytest.raises(ValueError, match="at least 2"):
        metrics.vendi_score(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least 2"):
        metrics.mean_pairwise_distance(np.zeros(4))
    with pytest.raises(ValueError, match="euclidean, cosine"):
        metrics.mean_pairwise_distance(np.zeros((3, 4)), "manhattan")
    with pytest.raises(ValueError, match=r"outside \[-1, 8\)"):
        metrics.colour_histogram_entropy(np.array([0, 8]), 8)
    with pytest.raises(ValueError, match="per prompt"):
        metrics.bootstrap_interval(np.zeros((2, 3)), seed=0)
    with pytest.raises(ValueError, match="level is 95"):
        metrics.bootstrap_interval(np.zeros(3), seed=0, level=95)
