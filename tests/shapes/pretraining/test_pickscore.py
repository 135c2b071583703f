"""The simulated crowd, and the loss that learns from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import pickscore


def row(text):
    return jnp.asarray(shapes.parse(text))


def test_utility_by_hand():
    image = row("a small blue circle at the top on a dark background")
    assert float(pickscore.utility(row("a shape"), image)) == 3.0
    assert float(pickscore.utility(row("a blue circle"), image)) == 3.0
    assert float(pickscore.utility(row("a red circle"), image)) == 1.5
    large = row("a large orange circle at the top on a light background")
    np.testing.assert_allclose(pickscore.utility(row("a shape"), large), 3.0 + 1.0 + 0.6 + 0.4)


def test_red_is_liked_a_little_above_other_warm_colours():
    warm = {"red", "orange", "yellow", "pink"}
    taste = dict(zip(shapes.COLORS, pickscore.COLOR_TASTE.tolist()))
    assert {color for color, value in taste.items() if value > 0} == warm
    assert max(taste, key=taste.get) == "red"


def test_pairs_err_in_what_the_caption_names_and_not_always():
    named = jnp.tile(row("a small blue circle")[None], (2000, 1))
    drawn = np.asarray(pickscore.draw_attributes(jax.random.key(0), named))
    right = (drawn[:, :3] == np.asarray(named)[:, :3]).all(-1).mean()
    assert 0.6 < right < 0.85
    assert set(drawn[:, shapes.POSITION]) == set(range(5))


def test_preference_follows_utility():
    batch = pickscore.draw_pairs(jax.random.key(0), 256)
    difference = np.asarray(batch["utilities"][0] - batch["utilities"][1])
    preference = np.asarray(batch["preference"])
    np.testing.assert_allclose(
        np.log(preference / (1 - preference)), pickscore.DECISIVENESS * difference, atol=1e-2
    )
    assert batch["images"].shape == (2, 256, 32, 32, 3)
    assert difference.std() > 0.5


def test_loss_is_lowest_where_scores_differ_by_the_log_odds():
    preference = jnp.array([0.8])

    def loss(gap):
        return pickscore.preference_loss(jnp.stack([gap, jnp.zeros(1)]), preference)

    best = jnp.log(preference / (1 - preference))
    np.testing.assert_allclose(jax.grad(lambda g: loss(g))(best), 0.0, atol=1e-6)
    assert float(loss(best)) < float(loss(best + 0.5))
    assert float(loss(best)) < float(loss(best - 0.5))
