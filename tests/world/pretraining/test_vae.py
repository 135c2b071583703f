"""The autoencoder's objective."""

from __future__ import annotations

import jax

from pec_jax.world.pretraining import vae


def test_batches_are_images_in_minus_one_to_one():
    pixels = vae.draw(jax.random.key(0))
    assert pixels.shape == (vae.BATCH, 64, 64, 3)
    assert float(pixels.min()) >= -1.0
    assert float(pixels.max()) <= 1.0
    assert float(pixels.min()) < -0.5 < 0.5 < float(pixels.max())
