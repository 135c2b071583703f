"""Stage `vae`: the autoencoder between 64 x 64 images and 16 x 16 x 4 latents.

Loss: |x - x^| + (x - x^)^2 + w KL(q(z|x) || N(0, I)), means over pixels and latents
(Kingma & Welling 2014; Rombach et al. 2022, section 3.1, without the adversary).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models import vae
from pec_jax.shapes.pretraining import common, skeleton
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit

STEM = "diffusion_pytorch_model"
BATCH = 8  # small: at equal time, more steps are worth more than larger ones
KL_WEIGHT = 3e-4
RECIPE = Recipe("vae", steps=9000, learning_rate=2.5e-3, ema_decay=0.995, weight_decay=1e-4)


def model() -> vae.AutoencoderKL:
    return vae.AutoencoderKL(vae.VAEConfig.from_dict(skeleton.VAE))


def initialise(key: jax.Array):
    pixels = jnp.zeros((1, 64, 64, 3))
    return common.initialise(model(), key, pixels)["params"]


def load(out: Path):
    """The variables that the stage wrote into a pipeline's directory."""
    return common.load(out / "vae", model(), STEM, jnp.zeros((1, 64, 64, 3)))


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp logvar) || N(0, 1)) = (mean^2 + var - 1 - logvar) / 2, elementwise."""
    return 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar)


def draw(key: jax.Array) -> jax.Array:
    """A batch of new images [BATCH, 64, 64, 3] in [-1, 1]."""
    return common.to_pixels(common.draw_pictures(key, BATCH).images)


def loss(params, ema, extra, pixels, key):
    """See `loop.Loss`."""
    del ema
    module, variables = model(), {"params": params}
    posterior: Any = module.apply(variables, pixels, method="encode")
    mean, logvar = posterior
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    decoded: Any = module.apply(variables, latents, method="decode")
    error = decoded - pixels
    kl = jnp.mean(kl_divergence(mean, logvar))
    square = jnp.mean(error**2)
    value = jnp.mean(jnp.abs(error)) + square + KL_WEIGHT * kl
    return value, ({"psnr": 10.0 * jnp.log10(4.0 / square), "kl": kl}, extra)


@jax.jit
def reconstruct(params, key: jax.Array):
    """Reconstruction error and latents of a batch of new images, through the posterior's mean."""
    images = common.draw_pictures(key, 128).images
    pixels = common.to_pixels(images)
    module, variables = model(), {"params": params}
    posterior: Any = module.apply(variables, pixels, method="encode")
    mean, logvar = posterior
    decoded: Any = module.apply(variables, mean, method="decode")
    decoded = jnp.clip(0.5 * decoded + 0.5, 0.0, 1.0)
    square = jnp.mean((decoded - images) ** 2, axis=(1, 2, 3))
    return square, jnp.mean(kl_divergence(mean, logvar)), mean


def run(session: Session) -> dict[str, float]:
    """Trains the autoencoder and sets scaling_factor and shift_factor from its latents."""
    init_key, held_out = jax.random.split(session.key("vae-init"))
    params = fit(session, RECIPE, loss, initialise(init_key), draw).ema
    outs = [reconstruct(params, key) for key in jax.random.split(held_out, 8)]
    square = np.concatenate([np.asarray(o[0]) for o in outs])
    latents = np.concatenate([np.asarray(o[2]) for o in outs])
    config = skeleton.VAE | {
        "scaling_factor": round(float(1.0 / latents.std()), 4),
        "shift_factor": round(float(latents.mean()), 4),
    }
    directory = session.out / "vae"
    skeleton.write_json(directory / "config.json", config)
    size = common.save(directory, {"params": params}, STEM)
    return {
        "psnr_db": float(-10.0 * np.log10(square.mean())),
        "psnr_worst_percent_db": float(-10.0 * np.log10(np.quantile(square, 0.99))),
        "kl_nats_per_dimension": float(np.mean([float(o[1]) for o in outs])),
        "latent_std": float(latents.std()),
        "latent_channel_stds": latents.std(axis=(0, 1, 2)).tolist(),
        "bytes": size,
    }
