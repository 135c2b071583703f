"""The autoencoder's objective."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pec_jax.shapes.pretraining import vae


def test_kl_equals_torchs():
    mean, logvar = jax.random.normal(jax.random.key(0), (2, 5, 3))
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(
        normal(torch.tensor(np.array(mean)), torch.tensor(np.exp(0.5 * np.array(logvar)))),
        normal(torch.zeros(5, 3), torch.ones(5, 3)),
    )
    np.testing.assert_allclose(vae.kl_divergence(mean, logvar), wanted, rtol=1e-5, atol=1e-6)


def test_loss_is_l1_plus_l2_plus_kl(monkeypatch):
    class Fake:
        """Encodes to a mean of 2 with almost no variance; decodes to 0.5 everywhere."""

        def apply(self, variables, x, method):
            if method == "encode":
                shape = (x.shape[0], 16, 16, 4)
                return jnp.full(shape, 2.0), jnp.full(shape, -20.0)
            return jnp.full((x.shape[0], 64, 64, 3), 0.5)

    monkeypatch.setattr(vae, "model", Fake)
    pixels = jnp.zeros((4, 64, 64, 3))
    value, (metrics, _) = vae.loss({}, None, None, pixels, jax.random.key(0))
    kl = 0.5 * (4.0 + np.exp(-20.0) - 1.0 + 20.0)
    np.testing.assert_allclose(value, 0.5 + 0.25 + vae.KL_WEIGHT * kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4.0 / 0.25), rtol=1e-5)


def test_batches_are_images_in_minus_one_to_one():
    pixels = vae.draw(jax.random.key(0))
    assert pixels.shape == (vae.BATCH, 64, 64, 3)
    assert float(pixels.min()) >= -1.0
    assert float(pixels.max()) <= 1.0
    assert float(pixels.min()) < -0.5 < 0.5 < float(pixels.max())
