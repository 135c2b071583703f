"""A loaded pipeline as pure functions: guided velocity, decoder, schedule and sizes."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pec_jax.config import ConfigError
from pec_jax.families.pipeline import Pipeline
from pec_jax.flow import schedule
from pec_jax.flow.sampler import VelocityFn, guided
from pec_jax.models import vae
from pec_jax.types import Array, Conditioning, PyTree

# (guidance scale, negative conditioning) -> velocity function
Guide = Callable[[float, Conditioning | None], VelocityFn]


def guide_function(pipeline: Pipeline) -> Guide:
    """How a pipeline's velocity depends on the guidance scale.

    Models that were distilled with guidance (FLUX.1-dev) take the scale as an input; all others
    get classifier-free guidance, which calls them a second time for the negative conditioning.

    Returns:
        (scale, negative) -> v(variables, x_t [N, h, w, C], sigma, conditioning) -> [N, h, w, C].
    """
    module = pipeline.transformer

    def velocity_fn(*extra: float) -> VelocityFn:
        def velocity(variables: PyTree, x_t: Array, sigma: Array, conditioning: Conditioning):
            def inputs(scalar):
                return jnp.broadcast_to(jnp.asarray(scalar, jnp.float32) * 1000.0, x_t.shape[:1])

            text = conditioning.tokens, conditioning.pooled
            return module.apply(variables, x_t, inputs(sigma), *text, *map(inputs, extra))

        return velocity

    def guide(scale: float, negative: Conditioning | None) -> VelocityFn:
        if pipeline.embeds_guidance:
            return velocity_fn(scale)
        return guided(velocity_fn(), scale, negative)

    return guide


def usual_guidance(pipeline: Pipeline) -> float:
    """The guidance scale that a kind of model is published with."""
    if pipeline.family.name == "flux":
        return 3.5 if pipeline.embeds_guidance else 1.0
    return 4.5


def decode_function(pipeline: Pipeline) -> Callable[[PyTree, Array], Array]:
    """The decoder as (variables, latents [N, h, w, C]) -> images [N, H, W, 3] in [0, 1]."""

    def decode(variables: PyTree, latents: Array) -> Array:
        latents = vae.unscale_latents(pipeline.vae.config, latents)
        images = pipeline.vae.apply(variables, latents, method="decode")
        return jnp.clip(images.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)

    return decode


def sigmas(pipeline: Pipeline, num_steps: int, height: int, width: int) -> np.ndarray:
    """The pipeline's own schedule [num_steps + 1] for latents of height x width."""
    tokens = height * width // pipeline.patch_size**2
    return schedule.from_scheduler_config(
        pipeline.scheduler, num_steps, tokens, evenly=pipeline.family.name == "flux"
    )


def latent_size(pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
    """(h, w, C) of the latents of an image; 0 takes the pipeline's own size.

    Raises:
      ConfigError: if the size is not a whole number of patches.
    """
    height, width = height or pipeline.default_size, width or pipeline.default_size
    unit = pipeline.vae_scale_factor * pipeline.patch_size
    for name, size in (("height", height), ("width", width)):
        if size % unit:
            near = max(unit, round(size / unit) * unit)
            raise ConfigError(
                f"{name} is {size} pixels; this model takes multiples of {unit}, such as {near}."
            )
    factor = pipeline.vae_scale_factor
    return height // factor, width // factor, pipeline.latent_channels
