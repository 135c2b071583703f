"""A family for the tests, of what no other has: films, a masked text, and no pooled text."""

from __future__ import annotations

import dataclasses
import shutil

import flax.linen as nn
import jax.numpy as jnp

from pec_jax.families.base import Pipeline, timesteps
from pec_jax.families.flux import Flux1
from pec_jax.families.networks import Network, float_shape
from pec_jax.families.text import t5_encoder
from pec_jax.io import read_json, write_json
from pec_jax.models import layers
from pec_jax.models.attention import attention
from pec_jax.types import Conditioning


@dataclasses.dataclass(frozen=True)
class FilmConfig:
    """The fields of transformer/config.json."""

    frames: int = 3
    sample_size: int = 8
    channels: int = 4
    width: int = 16
    text_width: int = 128

    @classmethod
    def from_dict(cls, config):
        return cls(**{k: v for k, v in config.items() if not k.startswith("_")})


class FilmTransformer(nn.Module):
    """(x_t [N, frames, h, w, C], 1000 sigma [N], tokens [N, L, D], mask [N, L]) -> v."""

    config: FilmConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x, timestep, tokens, mask):
        width = self.config.width
        image = layers.Dense(width, name="attn.to_q")(x.reshape(len(x), -1, x.shape[-1]))
        time = layers.Dense(width, name="time")(layers.sinusoidal_embedding(timestep, 16))
        image = image + time[:, None]  # [N, frames * h * w, width]
        keys, values = (layers.Dense(width, name=f"attn.to_{n}")(tokens) for n in "kv")
        bias = jnp.where(mask, 0.0, -jnp.inf)[:, None, None]
        read = attention(*(a[:, :, None] for a in (image, keys, values)), bias=bias)[:, :, 0]
        out = layers.Dense(x.shape[-1], name="proj_out")(jnp.tanh(image + read))
        return out.reshape(x.shape)


def _inputs(c: FilmConfig):
    text = float_shape(1, 2, c.text_width), float_shape(1, 2)
    return float_shape(1, c.frames, 1, 1, c.channels), float_shape(1), *text


class Film(Pipeline):
    """A T5 encoder conditions a film by attention; its first frame is the image."""

    name = "film"
    class_name = "FilmPipeline"
    transformer_network = Network("FilmTransformer", FilmTransformer, FilmConfig, _inputs)
    text_encoders = (t5_encoder("text_encoder_2", "t5"),)
    text_length = 64
    tiny = dataclasses.asdict(FilmConfig())
    patch_size = 1
    default_guidance = 5.0

    @property
    def default_size(self):
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def transformer_channels(self):
        return (self.transformer.config.channels,) * 2

    def velocity(self, variables, x_t, sigma, conditioning, guidance=None):
        text = conditioning.tokens, conditioning.mask
        return self.transformer.apply(variables, x_t, timesteps(sigma, x_t), *text)

    @classmethod
    def combiner(cls, root, text_length):
        return lambda outputs, masks: Conditioning(outputs["t5"], mask=masks["t5"])

    def conditioning_shapes(self):
        length, width = self.text_lengths["t5"], self.transformer.config.text_width
        mask = float_shape(length).update(dtype=jnp.bool_)
        return Conditioning(float_shape(length, width), mask=mask)

    def latent_shape(self, height=0, width=0):
        return self.transformer.config.frames, *super().latent_shape(height, width)

    def decode(self, variables, latents):
        return super().decode(variables, latents[:, 0])

    @classmethod
    def make_tiny_parts(cls, root):
        Flux1.make_tiny_parts(root)
        for name in ("text_encoder", "tokenizer"):
            shutil.rmtree(root / name)
        index = read_json(root / "model_index.json")
        index |= {"_class_name": cls.class_name, "transformer": ["tests", "FilmTransformer"]}
        write_json(root / "model_index.json", index)
