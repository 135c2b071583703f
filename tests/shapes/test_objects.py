"""The objects' distance fields: sizes, areas, and that they are distances."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes import judge, objects

STEP = 4.0 / 1024
AXIS = (np.arange(1024) + 0.5) * STEP - 2.0
X, Y = (jnp.asarray(a, jnp.float32) for a in np.meshgrid(AXIS, AXIS))


@pytest.mark.parametrize("kind", range(len(objects.KINDS)))
def test_a_silhouette_fills_about_its_unit_circle(kind):
    inside = np.asarray(objects.silhouette(kind, X, Y)) < 0
    for axis in (np.asarray(X), np.asarray(Y)):
        assert -1.1 < axis[inside].min() < -0.5 and 0.5 < axis[inside].max() < 1.1


@pytest.mark.parametrize("kind", range(len(objects.KINDS)))
def test_the_judge_knows_areas_and_centroids(kind):
    distance = np.asarray(objects.silhouette(kind, X, Y))
    a, b, c = judge.AREAS[kind]
    for width in (0.0, 0.1, 0.2):
        area = np.sum(distance < width) * STEP**2
        np.testing.assert_allclose(area, a + b * width + c * width**2, rtol=0.02)
    inside = distance < 0.12  # an outline of 1 px at a radius of 8
    centroid = [np.mean(np.asarray(axis)[inside]) for axis in (X, Y)]
    np.testing.assert_allclose(centroid, judge.CENTROIDS[kind], atol=0.03)


@pytest.mark.parametrize("kind", range(len(objects.KINDS)))
def test_distances_grow_by_at_most_the_way(kind):
    """|grad d| <= 1: an outline is nowhere thinner than it should be (ellipses: to first order)."""
    distance = np.asarray(objects.silhouette(kind, X, Y))
    slope = np.hypot(*np.gradient(distance, STEP))
    near = np.abs(distance) < 0.1
    assert np.quantile(slope[near], 0.99) < 1.05
    assert np.quantile(slope[near], 0.05) > 0.6


def test_layers_lie_within_their_silhouette():
    silhouettes, layers = objects.distances(X[::8, ::8], Y[::8, ::8])
    assert layers.shape == (128, 128, len(objects.KINDS), objects.LAYERS)
    painted = np.asarray(layers).min(-1) < 0
    assert np.mean(painted & (np.asarray(silhouettes) > 0.02)) < 1e-3
