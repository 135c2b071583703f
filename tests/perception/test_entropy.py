"""The entropy estimators: closed forms, invariances, credit, and behaviour at the edges."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.perception import entropy

KINDS = {
    "gaussian": functools.partial(entropy.gaussian_surprisal, bandwidth=0.3),
    "logdet": entropy.logdet_surprisal,
    "knn": entropy.knn_surprisal,
}
UNIT_NORMAL = 0.5 * math.log(2 * math.pi * math.e)  # entropy of N(0, 1), nats


@functools.cache
def _compiled(name, **options):
    return jax.jit(functools.partial(KINDS[name], **options))


def _features(num_images=12, dim=5, seed=0, groups=()):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*groups, num_images, dim)).astype(np.float32)


def _correlated(num_images, seed=0):
    """Samples of a Gaussian of known covariance, and its entropy in nats per dimension."""
    factor = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 2.0]])
    samples = _features(num_images, 3, seed) @ factor.T + 7.0
    return samples.astype(np.float32), UNIT_NORMAL + math.log(abs(np.linalg.det(factor))) / 3


@pytest.mark.parametrize("name", ["logdet", "knn"])
def test_entropy_of_a_known_gaussian(name):
    samples, expected = _correlated(1500)
    # The error of a mean of 1500 surprisals of variance about 1 / d (a little more for knn).
    np.testing.assert_allclose(_compiled(name)(samples).mean(), expected, atol=0.06)


def test_entropy_of_a_known_isotropic_gaussian_of_that_bandwidth():
    samples = 0.3 * _features(3000, 3)
    h = _compiled("gaussian")(samples)
    np.testing.assert_allclose(h.mean(), UNIT_NORMAL + math.log(0.3), atol=0.04)


def test_surprisals_are_the_densities_of_a_known_gaussian():
    """Image by image, and not in the mean alone."""
    samples = 0.3 * _features(2000, 3, seed=1)
    exact = (np.square(samples / 0.3).mean(-1) + math.log(2 * math.pi)) / 2 + math.log(0.3)
    for name, correlation in (("gaussian", 0.999), ("logdet", 0.99), ("knn", 0.85)):
        h = np.asarray(_compiled(name)(samples))
        slope, offset = np.polyfit(exact, h, 1)
        assert np.corrcoef(exact, h)[0, 1] > correlation, name
        # knn smooths: in the tails a neighbour is nearer the centre than the image is.
        np.testing.assert_allclose(slope, 1.0, atol=0.05 if name != "knn" else 0.25)
        np.testing.assert_allclose(slope * exact.mean() + offset, exact.mean(), atol=0.05)


def test_gaussian_is_its_formula():
    f = _features(6, 4)
    s = 0.7
    expected = [
        ((row - f.mean(0)) ** 2).sum() / (2 * s**2 * 4) + 0.5 * math.log(2 * math.pi * s**2)
        for row in f
    ]
    np.testing.assert_allclose(entropy.gaussian_surprisal(f, s), expected, rtol=1e-5)


def test_knn_is_its_formula():
    from scipy.special import digamma, gammaln

    f, k = _features(9, 4), 2
    for i, h in enumerate(np.asarray(_compiled("knn", k=k)(f))):
        rho = np.sort(np.linalg.norm(np.delete(f, i, 0) - f[i], axis=1))[k - 1]
        log_volume = 2 * math.log(math.pi) - gammaln(3.0)
        expected = math.log(rho) + (digamma(9) - digamma(k) + log_volume) / 4
        np.testing.assert_allclose(h, expected, rtol=1e-5)


def _log_det_entropy(f, eps, scatter_ridge=None):
    """1/(2 d) log det(2 pi e (Sigma + eps I)) in float64, straight from the definition."""
    f = f.astype(np.float64)
    centred = f - f.mean(0)
    count, dim = f.shape
    ridge = count * eps if scatter_ridge is None else scatter_ridge
    covariance = (centred.T @ centred + ridge * np.eye(dim)) / count
    return np.linalg.slogdet(2 * math.pi * math.e * covariance)[1] / (2 * dim)


GROUPS = pytest.mark.parametrize(("num_images", "dim"), [(6, 20), (16, 64), (20, 20), (20, 6)])


def _unit(*size, seed=0):
    f = _features(*size, seed=seed)
    return f / np.linalg.norm(f, axis=-1, keepdims=True)


@GROUPS
def test_logdet_entropy_is_its_definition(num_images, dim):
    f, eps = _unit(num_images, dim), 1e-3
    h = _compiled("logdet", eps=eps)(f)
    np.testing.assert_allclose(h.mean(), _log_det_entropy(f, eps), atol=2e-4)


@GROUPS
def test_logdet_credit_is_leave_one_out(num_images, dim):
    eps = 1e-3
    f = _unit(num_images, dim, seed=2)
    h = np.asarray(_compiled("logdet", eps=eps)(f))
    everything = _log_det_entropy(f, eps)
    lost = [
        everything - _log_det_entropy(np.delete(f, i, 0), eps, scatter_ridge=num_images * eps)
        for i in range(num_images)
    ]
    expected = (num_images - 1) * (np.array(lost) - np.mean(lost))
    np.testing.assert_allclose(h - h.mean(), expected, rtol=2e-3, atol=2e-4)
    assert np.std(expected) > 5e-3  # there was credit to give


def test_logdet_gives_credit_where_mahalanobis_distances_cannot():
    """K <= d: in-sample distances are all equal, yet near-twins must earn less."""
    f = _features(8, 40)
    f[1] = f[0] + 0.1 * _features(1, 40, seed=5)
    f /= np.linalg.norm(f, axis=-1, keepdims=True)
    h = np.asarray(_compiled("logdet")(f))
    assert max(h[:2]) < min(h[2:])
    assert min(h[2:]) - max(h[:2]) > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_group_statistics_are_per_group(name):
    f = _features(groups=(2, 3))
    h = _compiled(name)(f)
    assert h.shape == (2, 3, 12) and h.dtype == jnp.float32
    np.testing.assert_allclose(h[1, 2], _compiled(name)(f[1, 2]), rtol=1e-4, atol=1e-5)


SIZES = [(12, 5), (8, 40)]  # K > d and K < d take different ways through logdet


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_permutation_equivariant(name, size):
    f = _features(*size, seed=3)
    order = np.random.default_rng(0).permutation(size[0])
    np.testing.assert_allclose(
        _compiled(name)(f[order]), _compiled(name)(f)[order], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_translation_and_rotation_invariant(name, size):
    f = _features(*size, seed=4)
    rotation, _ = np.linalg.qr(_features(size[1], size[1], seed=5))
    expected = _compiled(name)(f)
    np.testing.assert_allclose(_compiled(name)(f + 3.0), expected, rtol=1e-4, atol=5e-5)
    np.testing.assert_allclose(_compiled(name)(f @ rotation), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_scaling_shifts_by_the_log_of_the_factor(factor):
    f = _features(12, 5)
    for name in ("logdet", "knn"):
        shift = _compiled(name)(factor * f) - _compiled(name)(f)
        np.testing.assert_allclose(shift.mean(), math.log(factor), atol=1e-3)
    # With a bandwidth that scales along, the Gaussian does so too.
    shift = entropy.gaussian_surprisal(factor * f, factor * 0.3) - KINDS["gaussian"](f)
    np.testing.assert_allclose(shift, math.log(factor), atol=1e-4)


def test_scaling_a_small_group_moves_the_directions_it_spans():
    """K <= d: K - 1 of d directions carry variance, the ridge holds the others."""
    f = _features(6, 30)
    estimator = _compiled("logdet", eps=1e-6)
    shift = estimator(3 * f) - estimator(f)
    # The ridge is held at 1e-6 of the total variance at least, which scales too here.
    grown = 5 / 30 * math.log(3)
    total = np.square(f - f.mean(0)).sum(1).mean()
    ridge = [max(1e-6, 1e-6 * total * c) for c in (1, 9)]
    grown += 25 / 60 * math.log(ridge[1] / ridge[0])
    np.testing.assert_allclose(shift.mean(), grown, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_duplicate_lowers_the_entropy(name, size):
    # The mean over which image copies which: one that was dull may well copy a lively one.
    f = _features(*size, seed=10)
    replaced, source = np.nonzero(~np.eye(size[0], dtype=bool))
    copied = np.repeat(f[None], len(source), axis=0)
    copied[np.arange(len(source)), replaced] = f[source]
    # The k-th neighbour notices a pair only for k = 1.
    estimator = _compiled("knn", k=1) if name == "knn" else _compiled(name)
    after, before = estimator(copied).mean(-1), estimator(f).mean()
    assert np.all(np.isfinite(after))
    assert after.mean() < before - 0.01
    if name == "knn" or (name == "logdet" and size[0] < size[1]):
        assert after.max() < before


def test_a_third_neighbour_notices_four_of_a_kind():
    f = _features(8, 40)
    copied = f.copy()
    copied[:4] = copied[0]
    h = np.asarray(_compiled("knn", k=3)(copied))
    assert h[:4].max() < h[4:].min() - 5
    assert h.mean() < float(_compiled("knn", k=3)(f).mean()) - 2


def test_nearest_neighbour_twins_are_worth_very_little_but_not_minus_infinity():
    f = _features(8, 40)
    f[1] = f[0]
    h = np.asarray(_compiled("knn", k=1)(f))
    assert np.all(np.isfinite(h))
    assert h[:2].max() < h[2:].min() - 5
    floor = np.asarray(_compiled("knn", k=1, min_distance=1e-2)(f))
    np.testing.assert_allclose(floor[:2] - h[:2], math.log(100), rtol=1e-5)
    np.testing.assert_array_equal(floor[2:], h[2:])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scale", entropy.SCALES)
@pytest.mark.parametrize("size", [(8, 4), (2, 9)])
def test_values_and_gradients_are_finite(name, scale, size):
    estimator = entropy.get_estimator(name)
    option = {"gaussian": {"bandwidth": 0.1}, "knn": {"k": 1}}.get(name, {})
    differentiated = jax.jit(
        jax.value_and_grad(
            lambda f: jnp.sum(jnp.cos(estimator(entropy.scale_features(f, scale), **option)))
        )
    )
    distinct = _features(*size)
    one_pair = distinct.copy()
    one_pair[0] = one_pair[1]
    collapsed = np.broadcast_to(distinct[:1], size)
    for f in (distinct, one_pair, collapsed, np.zeros(size, np.float32)):
        value, gradient = differentiated(f)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
    _, gradient = differentiated(distinct)
    if size[0] > 2 or name == "knn":
        assert float(jnp.abs(gradient).max()) > 0


@pytest.mark.parametrize("name", KINDS)
def test_spread_raises_and_collapse_lowers(name):
    f = _features(8, 40)
    entropies = [float(_compiled(name)(c * f).mean()) for c in (0.01, 0.1, 1.0)]
    assert entropies == sorted(entropies)
    assert entropies[2] - entropies[0] > 0.5


def test_an_outlier_among_clones_gets_the_credit():
    f = np.repeat(_features(1, 40), 8, axis=0) + 1e-2 * _features(8, 40, seed=1)
    f[3] = _features(1, 40, seed=2)
    for name in KINDS:
        h = np.asarray(_compiled(name)(f))
        assert np.all(np.isfinite(h)) and h.argmax() == 3, name
        assert h[3] - np.delete(h, 3).max() > 0.05, name


def test_perceptual_variance_is_the_trace_of_the_covariance():
    f = _features(groups=(3,))
    expected = [np.trace(np.cov(group.T, bias=True)) for group in f]
    np.testing.assert_allclose(entropy.perceptual_variance(f), expected, rtol=1e-5)
    np.testing.assert_array_equal(entropy.perceptual_variance(np.ones((4, 3))), 0.0)


def test_scale_features():
    f = _features()
    unit = entropy.scale_features(f, "unit")
    np.testing.assert_allclose(unit, f / np.linalg.norm(f, axis=-1, keepdims=True), rtol=1e-5)
    wide = entropy.scale_features(f, "unit_sqrt_d")
    np.testing.assert_allclose(np.square(wide).mean(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(entropy.scale_features(np.zeros((2, 3)), "unit"), 0.0)


def test_schedule_bandwidth_is_the_root_mean_square():
    stds = np.array([0.7, 0.3, 0.1])
    expected = math.sqrt((0.49 + 0.09 + 0.01) / 3)
    np.testing.assert_allclose(entropy.schedule_bandwidth(stds), expected, rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_one_image_is_no_group(name):
    with pytest.raises(ValueError, match="at least 2"):
        KINDS[name](np.zeros((3, 1, 5), np.float32))


@pytest.mark.parametrize("k", [0, 4, 9])
def test_k_must_be_below_the_group_size(k):
    with pytest.raises(ValueError, match=rf"k is {k}.*group of 4"):
        entropy.knn_surprisal(_features(4, 3), k=k)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="eps is 0"):
        entropy.logdet_surprisal(_features(), eps=0.0)
    with pytest.raises(ValueError, match="gaussian, logdet, knn"):
        entropy.get_estimator("kde")
    with pytest.raises(ValueError, match="unit, unit_sqrt_d"):
        entropy.scale_features(_features(), "none")


@pytest.mark.parametrize("size", [(12, 5), (5, 12)])
def test_logdet_calls_no_lapack(size):
    """Batched calls of jaxlib's LAPACK can wait for one another for ever, see `_half_solve`."""
    lowered = _compiled("logdet").lower(_features(*size, groups=(3,)))
    assert "custom-call" not in lowered.compile().as_text()


@pytest.mark.parametrize("name", entropy.ESTIMATORS)
@pytest.mark.parametrize("dim", [3, 40])  # fewer and more dimensions than images
def test_an_image_that_is_not_finite_is_no_sibling(name, dim):
    """The others' surprisals are what they are without it."""
    features = np.random.default_rng(0).normal(size=(2, 9, dim)).astype(np.float32)
    broken = features.copy()
    broken[0, 4, 1] = np.nan
    broken[0, 6] = np.inf
    options = {"gaussian": {"bandwidth": 0.5}, "logdet": {"eps": 1e-2}, "knn": {"k": 3}}[name]
    found = np.asarray(entropy.ESTIMATORS[name](broken, **options))
    assert np.isnan(found[0, [4, 6]]).all()
    kept = np.delete(np.arange(9), [4, 6])
    expected = entropy.ESTIMATORS[name](features[:1, kept], **options)
    np.testing.assert_allclose(found[:1, kept], expected, rtol=2e-4, atol=2e-4)
    whole = entropy.ESTIMATORS[name](features[1:], **options)
    np.testing.assert_allclose(found[1:], whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        entropy.perceptual_variance(broken)[0],
        entropy.perceptual_variance(features[:1, kept])[0],
        rtol=1e-5,
    )


def test_too_few_neighbours_are_said_and_not_invented():
    features = np.full((1, 5, 4), np.nan, np.float32)
    features[0, :3] = np.eye(3, 4)
    assert np.isnan(np.asarray(entropy.ESTIMATORS["knn"](features, k=3))).all()
    assert np.isfinite(np.asarray(entropy.ESTIMATORS["knn"](features, k=2)))[0, :3].all()


@pytest.mark.parametrize("size", [1e20, 1e-13, 1e-30])
def test_features_of_any_size_are_brought_to_norm_one(size):
    direction = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    scaled = entropy.scale_features((direction * np.float32(size)).astype(np.float32), "unit")
    np.testing.assert_allclose(scaled, entropy.scale_features(direction, "unit"), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=-1), 1.0, rtol=1e-5)


def test_a_zero_vector_stays_zero_with_a_finite_gradient():
    gradient = jax.grad(lambda x: entropy.scale_features(x, "unit").sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(entropy.scale_features(np.zeros((2, 3)), "unit"), 0.0)
