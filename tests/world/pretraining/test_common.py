"""What the stages share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.shapes.pretraining import common as base
from pec_jax.world import scenes as shapes
from pec_jax.world.pretraining import common


def test_captions_of_every_openness_are_common_and_true():
    key = jax.random.key(0)
    attributes = shapes.fill_open(key, jnp.full((2000, 6), shapes.OPEN))
    named = np.asarray(base.hide_some(jax.random.fold_in(key, 1), attributes, 0.3))
    kept = named >= 0
    np.testing.assert_array_equal(named[kept], np.asarray(attributes)[kept])
    share = np.bincount(kept.sum(-1), minlength=7) / 2000
    assert share.min() > 0.06  # each number of named attributes, none to six
    assert 0.3 < share[6] < 0.5


def test_augmentation_is_light_and_stays_in_range():
    images = common.draw_pictures(jax.random.key(0), 64).images
    augmented = common.augment(jax.random.key(1), images)
    assert float(augmented.min()) >= 0.0
    assert float(augmented.max()) <= 1.0
    change = float(jnp.mean(jnp.abs(augmented - images)))
    assert 0.002 < change < 0.02


def test_pictures_show_every_value_and_many_finishes():
    drawn = common.draw_pictures(jax.random.key(0), 512)
    assert drawn.images.shape == (512, 64, 64, 3)
    for i, values in enumerate(shapes.VALUES):
        assert set(np.asarray(drawn.attributes)[:, i]) == set(range(len(values)))
    assert np.asarray(drawn.defects).std(0).min() > 0.2
