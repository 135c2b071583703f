"""The crowd: what its utility is made of, and how it chooses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes import crowd, finish, scenes

N = 4096


@pytest.fixture(scope="module")
def pictures():
    nothing = jnp.full((N, 6), scenes.OPEN)
    attributes = scenes.fill_open(jax.random.key(0), nothing)
    return nothing, attributes, finish.draw_defects(jax.random.key(1), N)


def test_most_of_the_utility_is_finish(pictures):
    nothing, attributes, defects = pictures
    people = crowd.sample(jax.random.key(2))
    mean = lambda d, a: np.asarray(jnp.mean(crowd.utilities(people, nothing, a, d), axis=0))  # noqa: E731
    whole = mean(defects, attributes)
    well_made = mean(defects, jnp.zeros_like(attributes))
    assert np.corrcoef(whole, well_made)[0, 1] ** 2 > 0.75
    taste = mean(jnp.zeros_like(defects), attributes) - (
        np.asarray(crowd.harmony(attributes)) * float(jnp.mean(people.harmony))
    )
    assert np.std(taste) < 0.2 * np.std(whole)


def test_many_scenes_are_equally_harmonious(pictures):
    _, attributes, _ = pictures
    harmony = np.asarray(crowd.harmony(attributes))
    assert set(np.unique(harmony)) == {0.0, 1.0}
    np.testing.assert_allclose(harmony.mean(), 0.5, atol=0.03)


def test_what_was_asked_for_counts(pictures):
    _, attributes, defects = pictures
    people = crowd.sample(jax.random.key(2))
    wrong = (attributes + 1) % jnp.asarray(scenes.NUM_VALUES)
    right = crowd.utilities(people, attributes, attributes, defects)
    other = crowd.utilities(people, wrong, attributes, defects)
    np.testing.assert_allclose(right - other, people.faithfulness[:, None] + 0.0 * other, rtol=1e-3)


def test_preference_is_a_share(pictures):
    nothing, attributes, defects = pictures
    people = crowd.sample(jax.random.key(2))
    first = crowd.utilities(people, nothing, attributes, defects)
    second = crowd.utilities(people, nothing, attributes[::-1], defects[::-1])
    share = np.asarray(crowd.preference(first, second))
    assert share.min() >= 0.0 and share.max() <= 1.0
    np.testing.assert_allclose(share + np.asarray(crowd.preference(second, first)), 1.0, atol=1e-5)
    better = np.asarray(jnp.mean(first - second, axis=0))
    assert np.corrcoef(share, better)[0, 1] > 0.9


def test_two_samples_of_raters_agree_on_much_but_not_on_all(pictures):
    nothing, attributes, defects = pictures
    means = [
        np.asarray(
            jnp.mean(
                crowd.utilities(crowd.sample(jax.random.key(seed)), nothing, attributes, defects),
                axis=0,
            )
        )
        for seed in (1, 2)
    ]
    assert 0.9 < np.corrcoef(*means)[0, 1] < 0.9999


def test_the_crowd_of_taste_alone_ignores_finish(pictures):
    nothing, attributes, defects = pictures
    one = crowd.taste_only()
    now = crowd.utilities(one, nothing, attributes, defects)
    np.testing.assert_array_equal(now, crowd.utilities(one, nothing, attributes, 0.0 * defects))
    look = np.asarray(now)[0]
    best = np.asarray(attributes)[look > look.max() - 1e-3]
    assert np.all(best[:, scenes.COLOR] == 0) and np.all(best[:, scenes.SIZE] == 1)
