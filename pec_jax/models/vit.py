"""The vision transformer of DINO (transformers' `ViTModel` without its pooler).

DINO's image feature is the class token of the output, `last_hidden_state[:, 0]`. Tensors have the
names that `save_pretrained` writes and published checkpoints hold (`encoder.layer.0.attention.
attention.query.weight`), not the shorter ones that transformers 5 uses in memory.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; Caron et al. 2021, "Emerging
Properties in Self-Supervised Vision Transformers".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as init

from pec_jax.distributed.mesh import at_use, constrain
from pec_jax.models import hf_config
from pec_jax.models.attention import attention
from pec_jax.models.layers import (
    Conv,
    Dense,
    LayerNorm,
    activation,
    merge_heads,
    run_name,
    scan_layers,
    split_heads,
)

Array = jax.Array

# A head that DINO was not trained with: transformers adds it with random values and saves it.
IGNORED_TENSORS = (r"pooler\..*",)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The entries of a config.json that matter; defaults are those of transformers."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        hf_config.check_activation("hidden_act", self.hidden_act)
        hf_config.check_heads(self.hidden_size, self.num_attention_heads)
        object.__setattr__(self, "image_size", hf_config.square("image_size", self.image_size))
        object.__setattr__(self, "patch_size", hf_config.square("patch_size", self.patch_size))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """Reads the config.json of a ViT.

        Raises:
            ValueError: another model's config, or an entry that we cannot compute.
        """
        hf_config.check_choice("model_type", values.get("model_type", "vit"), ("vit",))
        config = hf_config.select(cls, values)
        width = config.hidden_size // config.num_attention_heads
        hf_config.check_choice("head_dim", values.get("head_dim", width), (width,))
        return config


class ViTEmbeddings(nn.Module):
    """A class token before the patches, row by row, plus position embeddings."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        c = self.config
        expected = (c.image_size, c.image_size, c.num_channels)
        if pixels.shape[1:] != expected:
            raise ValueError(f"images of shape {pixels.shape[1:]}, but the ViT expects {expected}")
        patch = (c.patch_size, c.patch_size)
        x = Conv(
            c.hidden_size,
            patch,
            patch,
            padding=((0, 0), (0, 0)),
            dtype=self.dtype,
            name="patch_embeddings.projection",
        )(pixels)
        x = x.reshape(x.shape[0], -1, c.hidden_size)  # [N, patches, D]
        axes = (None, None, "embed")
        table = nn.with_logical_partitioning(init.truncated_normal(0.02), axes)
        token = jnp.asarray(self.param("cls_token", table, (1, 1, c.hidden_size)), self.dtype)
        shape = (1, x.shape[1] + 1, c.hidden_size)
        positions = jnp.asarray(self.param("position_embeddings", table, shape), self.dtype)
        token, positions = at_use(token, *axes), at_use(positions, *axes)
        token = jnp.broadcast_to(token, (x.shape[0], 1, c.hidden_size))
        return jnp.concatenate([token, x], axis=1) + positions


def self_attention(h: Array, heads: int, use_bias: bool) -> Array:
    """Unmasked attention of normalised tokens [N, L, D] among themselves, with its projections.

    To be called inside a compact method, whose module then owns the projections; DINO and DINOv2
    name them alike.
    """
    width, dtype = h.shape[-1], h.dtype
    q, k, v = (
        split_heads(
            Dense(
                width,
                use_bias=use_bias,
                dtype=dtype,
                kernel_axes=("embed", "heads"),
                name=f"attention.attention.{name}",
            )(h),
            heads,
        )
        for name in ("query", "key", "value")
    )
    out = Dense(width, dtype=dtype, kernel_axes=("heads", "embed"), name="attention.output.dense")
    return out(merge_heads(attention(q, k, v)))


class ViTLayer(nn.Module):
    """One pre-norm transformer layer, not masked."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        c = self.config
        h = LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="layernorm_before")(x)
        x = x + self_attention(h, c.num_attention_heads, c.qkv_bias)
        h = LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="layernorm_after")(x)
        h = self._linear(c.intermediate_size, "intermediate.dense", ("embed", "mlp"))(h)
        h = activation(c.hidden_act)(constrain(h, "batch", "tokens", "mlp"))
        x = x + self._linear(c.hidden_size, "output.dense", ("mlp", "embed"))(h)
        return constrain(x, "batch", "tokens", "embed"), None

    def _linear(self, features: int, name: str, axes: tuple[str, str]) -> Dense:
        return Dense(features, dtype=self.dtype, kernel_axes=axes, name=name)


class ViTModel(nn.Module):
    """Normalised pixels [N, H, W, 3] -> last_hidden_state [N, 1 + patches, D]."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        c = self.config
        x = ViTEmbeddings(c, self.dtype, name="embeddings")(pixels)
        x = constrain(x, "batch", "tokens", "embed")
        run = scan_layers(ViTLayer, c.num_hidden_layers)
        x, _ = run(c, self.dtype, name=run_name("encoder.layer", 0, c.num_hidden_layers))(x)
        return LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="layernorm")(x)
