"""The image autoencoder of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752).

Names are diffusers' (`AutoencoderKL`); images and latents are NHWC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pec_jax.models import layers
from pec_jax.models.attention import attention

Array = jax.Array
EPSILON = 1e-6
MAX_LEVELS = 16  # a damaged config must not make us build forever
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The fields of vae/config.json that matter; `sample_size` is in pixels."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def scale_factor(self) -> int:
        """Image pixels a latent pixel, along one axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Reads a diffusers config; keys starting with "_" are notes and are ignored.

        Raises:
            ValueError: a key or a value that this network does not implement.
        """
        given = {k: v for k, v in config.items() if not k.startswith("_")}
        given["block_out_channels"] = tuple(given.get("block_out_channels", cls.block_out_channels))
        levels = len(given["block_out_channels"])
        required = {
            "act_fn": ("silu",),
            "down_block_types": (["DownEncoderBlock2D"] * levels,),
            "up_block_types": (["UpDecoderBlock2D"] * levels,),
            "latents_mean": (None,),
            "latents_std": (None,),
            "force_upcast": (True, False),  # a matter of precision, which `dtype` decides
        }
        for key, allowed in required.items():
            value = given.pop(key, allowed[0])
            value = list(value) if isinstance(value, tuple) else value
            if value not in allowed:
                raise ValueError(
                    f"vae config: {key} {value!r} is not supported; it must be "
                    f"{' or '.join(map(repr, allowed))}"
                )
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - known):
            key = unknown[0]
            raise ValueError(f"vae config: unknown key {key!r} (value {given[key]!r})")
        if given.get("shift_factor", 0.0) is None:
            given["shift_factor"] = 0.0
        return cls(**given)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"vae config: {field.name} {value} must be at least 1")
        if not self.block_out_channels or len(self.block_out_channels) > MAX_LEVELS:
            raise ValueError(
                f"vae config: block_out_channels {self.block_out_channels} must have 1 to "
                f"{MAX_LEVELS} levels"
            )
        if self.layers_per_block > MAX_LEVELS:
            raise ValueError(f"vae config: layers_per_block {self.layers_per_block} > {MAX_LEVELS}")
        if self.scaling_factor == 0.0:
            raise ValueError("vae config: scaling_factor must not be 0")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"vae config: block_out_channels {channels} is not a multiple of "
                    f"norm_num_groups {self.norm_num_groups}"
                )


def scale_latents(config: VAEConfig, latents: Array) -> Array:
    """(z - shift_factor) * scaling_factor: the encoder's latents to what the flow models."""
    return (latents - config.shift_factor) * config.scaling_factor


def unscale_latents(config: VAEConfig, latents: Array) -> Array:
    """z / scaling_factor + shift_factor: the flow's samples to what the decoder takes."""
    return latents / config.scaling_factor + config.shift_factor


class ResnetBlock(nn.Module):
    """Two times norm, SiLU, 3 x 3 convolution; a 1 x 1 shortcut where the width changes."""

    features: int
    num_groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = layers.GroupNorm(self.num_groups, EPSILON, self.dtype, name="norm1")(x)
        h = layers.Conv(self.features, dtype=self.dtype, name="conv1")(jax.nn.silu(h))
        h = layers.GroupNorm(self.num_groups, EPSILON, self.dtype, name="norm2")(h)
        h = layers.Conv(self.features, dtype=self.dtype, name="conv2")(jax.nn.silu(h))
        if x.shape[-1] != self.features:
            x = pointwise(self.features, self.dtype, "conv_shortcut")(x)
        return x + h


def pointwise(features: int, dtype: jnp.dtype, name: str | None = None) -> layers.Conv:
    """A 1 x 1 convolution."""
    return layers.Conv(features, (1, 1), padding=((0, 0), (0, 0)), dtype=dtype, name=name)


class SpatialAttention(nn.Module):
    """One-head self-attention over all positions, with a residual."""

    num_groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, channels = x.shape
        h = layers.GroupNorm(self.num_groups, EPSILON, self.dtype, name="group_norm")(x)
        h = h.reshape(n, height * width, channels)
        q, k, v = (
            layers.split_heads(
                layers.Dense(channels, dtype=self.dtype, kernel_axes=axes, name=name)(h), 1
            )
            for name, axes in zip(("to_q", "to_k", "to_v"), [("embed", "heads")] * 3)
        )
        h = layers.merge_heads(attention(q, k, v))
        h = layers.Dense(
            channels, dtype=self.dtype, kernel_axes=("heads", "embed"), name="to_out.0"
        )(h)
        return x + h.reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention (optional), residual block."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        groups, features = self.config.norm_num_groups, x.shape[-1]
        x = ResnetBlock(features, groups, self.dtype, name="resnets.0")(x)
        if self.config.mid_block_add_attention:
            x = SpatialAttention(groups, self.dtype, name="attentions.0")(x)
        return ResnetBlock(features, groups, self.dtype, name="resnets.1")(x)


class Resample(nn.Module):
    """Halves (stride 2, padded at the far edges only) or doubles (nearest) the resolution."""

    up: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, channels = x.shape
        if not self.up:
            padding = ((0, 1), (0, 1))
            conv = layers.Conv(
                channels, strides=(2, 2), padding=padding, dtype=self.dtype, name="conv"
            )
            return conv(x)
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (n, height, 2, width, 2, channels)).reshape(
            n, 2 * height, 2 * width, channels
        )
        return layers.Conv(channels, dtype=self.dtype, name="conv")(x)


class Level(nn.Module):
    """The residual blocks of one resolution, then the change to the next."""

    config: VAEConfig
    features: int
    num_resnets: int
    resample: str | None  # "downsamplers", "upsamplers" or none at the last level
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.num_resnets):
            block = ResnetBlock(
                self.features, self.config.norm_num_groups, self.dtype, name=f"resnets.{i}"
            )
            x = block(x)
        if self.resample is not None:
            up = self.resample == "upsamplers"
            x = Resample(up, self.dtype, name=f"{self.resample}.0")(x)
        return x


class Encoder(nn.Module):
    """Images [N, H, W, 3] -> moments [N, h, w, 2 * latent_channels]."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        x = layers.Conv(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        final = len(c.block_out_channels) - 1
        for i, features in enumerate(c.block_out_channels):
            resample = None if i == final else "downsamplers"
            x = Level(
                c, features, c.layers_per_block, resample, self.dtype, name=f"down_blocks.{i}"
            )(x)
        x = MidBlock(c, self.dtype, name="mid_block")(x)
        x = layers.GroupNorm(c.norm_num_groups, EPSILON, self.dtype, name="conv_norm_out")(x)
        return layers.Conv(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(jax.nn.silu(x))


class Decoder(nn.Module):
    """Latents [N, h, w, latent_channels] -> images [N, H, W, 3]."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array) -> Array:
        c = self.config
        x = layers.Conv(c.block_out_channels[-1], dtype=self.dtype, name="conv_in")(z)
        x = MidBlock(c, self.dtype, name="mid_block")(x)
        final = len(c.block_out_channels) - 1
        for i, features in enumerate(reversed(c.block_out_channels)):
            resample = None if i == final else "upsamplers"
            x = Level(
                c, features, c.layers_per_block + 1, resample, self.dtype, name=f"up_blocks.{i}"
            )(x)
        x = layers.GroupNorm(c.norm_num_groups, EPSILON, self.dtype, name="conv_norm_out")(x)
        return layers.Conv(c.out_channels, dtype=self.dtype, name="conv_out")(jax.nn.silu(x))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] to a Gaussian over latents, and latents back to images."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c, self.dtype)
        self.decoder = Decoder(c, self.dtype)
        if c.use_quant_conv:
            self.quant_conv = pointwise(2 * c.latent_channels, self.dtype)
        if c.use_post_quant_conv:
            self.post_quant_conv = pointwise(c.latent_channels, self.dtype)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """The posterior q(z | image), a diagonal Gaussian.

        Args:
            images: [N, H, W, 3] in [-1, 1]; H and W are multiples of `config.scale_factor`.

        Returns:
            (mean, logvar), each [N, h, w, latent_channels] fp32, unscaled; logvar is clipped to
            [-30, 20].

        Raises:
            ValueError: an image size that does not divide.
        """
        factor = self.config.scale_factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels: both must be multiples "
                f"of {factor}"
            )
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: Array) -> Array:
        """Images of unscaled latents.

        Args:
            latents: [N, h, w, latent_channels], unscaled (see `unscale_latents`).

        Returns:
            [N, H, W, 3] fp32, about [-1, 1], not clipped.
        """
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Decodes the mean of q(z | image); creates all parameters."""
        return self.decode(self.encode(images)[0])
