"""The transformer of FLUX.1 (Black Forest Labs 2024): blocks of two streams, then of one.

It works on 2 x 2 patches of latents packed into channels, knows places by rotary embeddings of
three axes (the first is unused in images), and, in its distilled form, takes the guidance scale
as an input. Module and parameter names are diffusers' (`FluxTransformer2DModel`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.distributed import mesh as sharding
from pec_jax.models import dit, layers

Array = jax.Array
PACK = 2  # latent pixels a token, along each axis
THETA = 10000.0
MAX_LAYERS = 1000  # a damaged config must not make us build forever


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """The fields of transformer/config.json; channels are those of packed patches."""

    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents before they are packed."""
        return self.in_channels // PACK**2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FluxConfig:
        """Reads a diffusers config; keys starting with "_" are notes and are ignored.

        Raises:
            ValueError: a key or a value that this network does not implement.
        """
        given = {k: v for k, v in config.items() if not k.startswith("_")}
        if (patch := given.pop("patch_size", 1)) != 1:
            raise ValueError(f"transformer config: patch_size {patch!r} must be 1")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - known):
            key = unknown[0]
            raise ValueError(
                f"transformer config: unknown key {key!r} (value {given[key]!r}); "
                f"known: {', '.join(sorted(known))}"
            )
        given["axes_dims_rope"] = tuple(given.get("axes_dims_rope", cls.axes_dims_rope))
        if given.get("out_channels") is None:
            given["out_channels"] = given.get("in_channels", cls.in_channels)
        return cls(**given)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < (0 if field.name == "num_single_layers" else 1):
                raise ValueError(f"transformer config: {field.name} {value} is too small")
        if max(self.num_layers, self.num_single_layers) > MAX_LAYERS:
            raise ValueError(f"transformer config: more than {MAX_LAYERS} layers")
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % PACK**2:
                raise ValueError(
                    f"transformer config: {name} {getattr(self, name)} must be a multiple of "
                    f"{PACK**2}: FLUX packs {PACK} x {PACK} latent pixels into a token"
                )
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(d < 0 or d % 2 for d in axes):
            raise ValueError(
                f"transformer config: axes_dims_rope {axes} must be three even numbers"
            )
        if sum(axes) != self.attention_head_dim:
            raise ValueError(
                f"transformer config: axes_dims_rope {axes} must sum to attention_head_dim "
                f"{self.attention_head_dim}"
            )


def pack(x: Array) -> Array:
    """Latents [N, h, w, C] -> tokens [N, (h/2)(w/2), 4 C], channels slowest within a token."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // PACK, PACK, w // PACK, PACK, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(n, (h // PACK) * (w // PACK), c * PACK**2)


def unpack(tokens: Array, height: int, width: int) -> Array:
    """The inverse of `pack`: [N, (h/2)(w/2), 4 C] -> [N, h, w, C]."""
    n, rows, columns = tokens.shape[0], height // PACK, width // PACK
    x = tokens.reshape(n, rows, columns, -1, PACK, PACK).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, height, width, -1)


def image_rotation(rows: int, columns: int, axes: tuple[int, ...]) -> dit.Rotation:
    """Angles of the rotary embedding of each image token, as cosines and sines.

    The token in row i and column j stands at (0, i, j); axis a turns its pairs of features by
    position * theta^(-2 m / d_a), m = 0 .. d_a / 2 - 1.

    Args:
        rows: of tokens.
        columns: of tokens.
        axes: features d_a of each axis, even.

    Returns:
        (cos, sin), each [rows * columns, sum(axes) / 2] fp32; text tokens stand at the origin.
    """
    places = np.stack(np.meshgrid([0.0], np.arange(rows), np.arange(columns), indexing="ij"), -1)
    places = places.reshape(-1, 3)  # float64, as are the angles: fp32 is too coarse for their sum
    angles = [
        places[:, axis, None] * THETA ** -(np.arange(0, dim, 2) / dim)
        for axis, dim in enumerate(axes)
    ]
    angle = np.concatenate(angles, axis=-1)
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


class SingleBlock(nn.Module):
    """One layer over image and text tokens as one stream: attention beside the MLP.

    x + gate * W [attention(h), GELU(V h)], h = LayerNorm(x) modulated.
    """

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, conditioning: Array, rotation: dit.Rotation) -> tuple[Array, None]:
        dim, dtype = x.shape[-1], self.dtype
        shift, scale, gate = dit.Modulation(3, dtype, name="norm")(conditioning)
        h = dit.modulate(x, shift, scale, dtype)
        attend = dit.JointAttention(
            self.num_heads, qk_norm=True, project_out=False, dtype=dtype, name="attn"
        )
        hidden = layers.Dense(4 * dim, dtype=dtype, name="proj_mlp")(h)
        both = jnp.concatenate([attend(h, rotation=rotation)[0], layers.gelu_tanh(hidden)], axis=-1)
        out = layers.Dense(dim, dtype=dtype, kernel_axes=("mlp", "embed"), name="proj_out")(both)
        return sharding.constrain(x + gate * out, "batch", "tokens", "embed"), None


class Flux(nn.Module):
    """The velocity field of FLUX.1: (x_t, sigma, text, guidance) -> v = eps - x_0."""

    config: FluxConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Array,
        timestep: Array,
        tokens: Array,
        pooled: Array,
        guidance: Array | None = None,
    ) -> Array:
        """Predicts the velocity.

        Args:
            x: latents x_t [N, h, w, C], not packed; h and w are even.
            timestep: 1000 * sigma [N], in [0, 1000].
            tokens: T5 embeddings [N, L, joint_attention_dim].
            pooled: pooled CLIP embedding [N, pooled_projection_dim].
            guidance: 1000 * guidance scale [N]; for `guidance_embeds` models, and only for them.

        Returns:
            Velocity [N, h, w, C] in x's dtype.

        Raises:
            ValueError: latents or text of a shape that the config excludes, or a guidance that is
                missing or has no place.
        """
        c = self.config
        _check_inputs(c, x, guidance)
        dit.check_text(tokens, c.joint_attention_dim, pooled, c.pooled_projection_dim)
        height, width = x.shape[1:3]
        image = layers.Dense(
            c.inner_dim, dtype=self.dtype, kernel_axes=("conv_in", "embed"), name="x_embedder"
        )(pack(x))
        embed = dit.TimeTextEmbed(c.inner_dim, self.dtype, name="time_text_embed")
        conditioning = jax.nn.silu(embed(timestep, pooled, guidance))  # [N, D]
        rotation = image_rotation(height // PACK, width // PACK, c.axes_dims_rope)
        streams = (image, dit.embed_context(tokens, c.inner_dim, self.dtype))
        double = layers.scan_layers(dit.JointBlock, c.num_layers, remat=self.remat)(
            c.num_attention_heads,
            True,
            dtype=self.dtype,
            name=layers.run_name("transformer_blocks", 0, c.num_layers),
        )
        streams, _ = double(streams, conditioning, rotation)
        stream = jnp.concatenate(streams, axis=1)  # image tokens first
        if c.num_single_layers:
            single = layers.scan_layers(SingleBlock, c.num_single_layers, remat=self.remat)(
                c.num_attention_heads,
                self.dtype,
                name=layers.run_name("single_transformer_blocks", 0, c.num_single_layers),
            )
            stream, _ = single(stream, conditioning, rotation)
        image = stream[:, : image.shape[1]]
        out = dit.project_out(image, conditioning, c.out_channels, self.dtype)
        return unpack(out, height, width).astype(x.dtype)


def _check_inputs(config: FluxConfig, x: Array, guidance: Array | None) -> None:
    if x.ndim != 4 or x.shape[-1] != config.latent_channels or x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(
            f"latents must be [N, h, w, {config.latent_channels}] with h and w even, not {x.shape}"
        )
    if config.guidance_embeds and guidance is None:
        raise ValueError("this FLUX model was distilled with guidance: pass the guidance scale")
    if guidance is not None and not config.guidance_embeds:
        raise ValueError("this FLUX model has no guidance embedding: pass no guidance scale")
