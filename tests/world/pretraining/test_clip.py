"""The contrastive objective and its batches."""

from __future__ import annotations

import jax
import numpy as np

from pec_jax.world import scenes as shapes
from pec_jax.world.pretraining import clip


def test_captions_of_a_batch_are_true_of_its_images():
    images, attributes, captions = clip.captioned_images(jax.random.key(0), 128)
    assert images.shape == (128, 64, 64, 3)
    named = shapes.all_attributes()[np.asarray(captions)]
    mentioned = named >= 0
    np.testing.assert_array_equal(named[mentioned], np.asarray(attributes)[mentioned])
