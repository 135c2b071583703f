"""Flow matching: its target, its noise levels, and its captions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.types import Conditioning
from pec_jax.world import scenes as shapes
from pec_jax.world.pretraining import transformer


def test_batches_pair_latents_with_captions_that_fit():
    """Latents carry their attributes, and the text table its own row numbers."""
    key = jax.random.key(0)
    attributes = shapes.fill_open(key, jnp.full((300, 6), shapes.OPEN))
    latents = jnp.zeros((300, 8, 8, 16)).at[:, 0, 0, 0].set(shapes.caption_index(attributes))
    rows = jnp.arange(shapes.NUM_CAPTIONS + 1, dtype=jnp.float32)
    text = Conditioning(tokens=rows[:, None, None], pooled=rows[:, None])
    pool = transformer.Pool(latents, attributes, text)
    x_0, conditioning = transformer.draw_batch(pool, jax.random.key(1), 2000)
    table = shapes.all_attributes()
    captions = np.asarray(conditioning.pooled[:, 0]).astype(int)
    empty = captions == transformer.EMPTY
    assert 0.07 < empty.mean() < 0.13
    shown = table[np.asarray(x_0[:, 0, 0, 0]).astype(int)][~empty]
    named = table[captions[~empty]]
    np.testing.assert_array_equal(named[named >= 0], shown[named >= 0])
    chance = 1 / 7  # the mean of (1 - s)^6, s uniform: no attribute hidden
    full = chance + (1 - chance) * transformer.SPECIFIED_SHARE
    assert abs((named >= 0).all(-1).mean() - full) < 0.05  # 4 standard errors of 1800 captions
