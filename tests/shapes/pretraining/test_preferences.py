"""Preference models: their pairs, and the loss that learns from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes import crowd as crowds
from pec_jax.shapes import finish
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import preferences


def test_pairs_err_in_what_the_caption_names_and_not_always():
    named = jnp.tile(jnp.asarray(shapes.parse("two small blue cats"))[None], (2000, 1))
    drawn = np.asarray(preferences.draw_attributes(jax.random.key(0), named))
    right = (drawn[:, :4] == np.asarray(named)[:, :4]).all(-1).mean()
    assert 0.6 < right < 0.85
    assert set(drawn[:, shapes.PLACE]) == set(range(5))


def test_pictures_are_as_on_the_web_and_better():
    score = np.asarray(
        finish.score(preferences.draw_defects(jax.random.key(0), jnp.zeros((4000, 6))))
    )
    assert np.mean(score < 0.4) > 0.2 and np.mean(score > 0.8) > 0.15


@pytest.mark.parametrize("study", preferences.STUDIES.values(), ids=lambda study: study.name)
def test_preference_follows_utility(study):
    batch = preferences.draw_pairs(study.crowd(), jax.random.key(0), 64)
    difference = np.asarray(batch["utilities"][0] - batch["utilities"][1])
    preference = np.asarray(batch["preference"])
    if study.raters is None:  # one mind: Bradley-Terry itself
        log_odds = np.log(preference / (1 - preference))
        np.testing.assert_allclose(log_odds, crowds.DECISIVENESS * difference, atol=1e-2)
    assert np.corrcoef(preference, np.tanh(difference))[0, 1] > 0.95
    assert batch["images"].shape == (2, 64, 64, 64, 3)


def test_the_two_crowds_are_not_the_same():
    first, second = (study.crowd() for study in (preferences.PICKSCORE, preferences.HPS))
    assert not np.allclose(first.finish, second.finish)


def test_loss_is_lowest_where_scores_differ_by_the_log_odds():
    preference = jnp.array([0.8])

    def loss(gap):
        return preferences.preference_loss(jnp.stack([gap, jnp.zeros(1)]), preference)

    best = jnp.log(preference / (1 - preference))
    np.testing.assert_allclose(jax.grad(lambda g: loss(g))(best), 0.0, atol=1e-6)
    assert float(loss(best)) < float(loss(best + 0.5))
    assert float(loss(best)) < float(loss(best - 0.5))
