"""The vision transformer of DINOv2, with or without register tokens.

A ViT whose residual branches have learned scales, whose largest size has a gated MLP, and whose
position embeddings are interpolated to the grid of the image at hand. Its image feature is the
class token of the normalised output, `last_hidden_state[:, 0]`. Tensors have the names of the
published checkpoints.

Sources: Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision"; Darcet
et al. 2023, "Vision Transformers Need Registers".
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
from pec_jax.models.layers import (
    Conv,
    Dense,
    LayerNorm,
    activation,
    run_name,
    scan_layers,
)
from pec_jax.models.resampling import cubic_weights, resize_weights
from pec_jax.models.vit import self_attention

Array = jax.Array

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# Stands for hidden patches in pre-training.
IGNORED_TENSORS = (r"embeddings\.mask_token",)


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The entries of a config.json that matter; defaults are those of transformers."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224  # of the position embeddings; images may have any size
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0
    model_type: str = "dinov2"

    def __post_init__(self) -> None:
        hf_config.check_choice("model_type", self.model_type, MODEL_TYPES)
        hf_config.check_activation("hidden_act", self.hidden_act)
        hf_config.check_heads(self.hidden_size, self.num_attention_heads)
        object.__setattr__(self, "image_size", hf_config.square("image_size", self.image_size))
        object.__setattr__(self, "patch_size", hf_config.square("patch_size", self.patch_size))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Dinov2Config:
        """Reads the config.json of a DINOv2.

        Raises:
            ValueError: another model's config, or an entry that we cannot compute.
        """
        registers = 0
        if values.get("model_type") == "dinov2_with_registers":
            registers = values.get("num_register_tokens", 4)
        return hf_config.select(cls, values, num_register_tokens=registers)

    @property
    def smooth_positions(self) -> bool:
        """Whether positions are smoothed when their grid shrinks: with registers they are."""
        return self.model_type == "dinov2_with_registers"

    @property
    def mlp_width(self) -> int:
        """Of the hidden layer; a gated one has two thirds, rounded up to a multiple of 8."""
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width


def interpolate_positions(table: Array, height: int, width: int, smooth: bool) -> Array:
    """Position embeddings of a square grid, for a grid of another size.

    Args:
        table: [side^2, D], row by row.
        height: patches wanted.
        width: patches wanted.
        smooth: filter widened where the grid shrinks, as Pillow does.

    Returns:
        [height * width, D] in the table's dtype, computed in fp32.
    """
    side = round(table.shape[0] ** 0.5)
    if (height, width) == (side, side):
        return table
    rows, columns = (
        resize_weights(side, new, resample=3) if smooth else cubic_weights(side, new)
        for new in (height, width)
    )
    grid = table.astype(jnp.float32).reshape(side, side, -1)
    grid = jnp.einsum(
        "yh,xw,hwd->yxd",
        jnp.asarray(rows, jnp.float32),
        jnp.asarray(columns, jnp.float32),
        grid,
        precision=jax.lax.Precision.HIGHEST,
    )
    return grid.reshape(height * width, -1).astype(table.dtype)


class Dinov2Embeddings(nn.Module):
    """Class token, registers without a position, then the patches row by row."""

    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        c = self.config
        n, height, width, channels = pixels.shape
        if channels != c.num_channels or min(height, width) < c.patch_size:
            raise ValueError(
                f"images of shape {pixels.shape[1:]}, but DINOv2 expects {c.num_channels} channels "
                f"and at least {c.patch_size} pixels a side"
            )
        patch = (c.patch_size, c.patch_size)
        x = Conv(
            c.hidden_size,
            patch,
            patch,
            padding=((0, 0), (0, 0)),
            dtype=self.dtype,
            name="patch_embeddings.projection",
        )(pixels)
        rows, columns = x.shape[1:3]
        count = (c.image_size // c.patch_size) ** 2
        positions = self._table("position_embeddings", 1 + count)
        table = interpolate_positions(positions[0, 1:], rows, columns, smooth=c.smooth_positions)
        x = x.reshape(n, -1, c.hidden_size) + table
        tokens = [self._table("cls_token", 1) + positions[:, :1]]
        if c.num_register_tokens:
            tokens.append(self._table("register_tokens", c.num_register_tokens))
        tokens = [jnp.broadcast_to(t, (n, *t.shape[1:])) for t in tokens]
        return jnp.concatenate([*tokens, x], axis=1)

    def _table(self, name: str, length: int) -> Array:
        axes = (None, None, "embed")
        table = nn.with_logical_partitioning(init.truncated_normal(0.02), axes)
        value = self.param(name, table, (1, length, self.config.hidden_size))
        return at_use(jnp.asarray(value, self.dtype), *axes)


class Dinov2Layer(nn.Module):
    """One pre-norm transformer layer with scaled residual branches, not masked."""

    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        c = self.config
        h = LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="norm1")(x)
        h = self_attention(h, c.num_attention_heads, c.qkv_bias)
        x = x + self._scale("layer_scale1.lambda1") * h
        h = LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="norm2")(x)
        x = x + self._scale("layer_scale2.lambda1") * self._mlp(h)
        return constrain(x, "batch", "tokens", "embed"), None

    def _mlp(self, h: Array) -> Array:
        c = self.config
        if c.use_swiglu_ffn:
            gate_and_value = self._linear(2 * c.mlp_width, "mlp.weights_in", ("embed", "mlp"))(h)
            gate, value = jnp.split(gate_and_value, 2, axis=-1)
            return self._linear(c.hidden_size, "mlp.weights_out", ("mlp", "embed"))(
                nn.silu(gate) * value
            )
        h = activation(c.hidden_act)(self._linear(c.mlp_width, "mlp.fc1", ("embed", "mlp"))(h))
        h = constrain(h, "batch", "tokens", "mlp")
        return self._linear(c.hidden_size, "mlp.fc2", ("mlp", "embed"))(h)

    def _linear(self, features: int, name: str, axes: tuple[str, str]) -> Dense:
        return Dense(features, dtype=self.dtype, kernel_axes=axes, name=name)

    def _scale(self, name: str) -> Array:
        ones = nn.with_logical_partitioning(init.ones, ("embed",))
        return jnp.asarray(self.param(name, ones, (self.config.hidden_size,)), self.dtype)


class Dinov2Model(nn.Module):
    """Normalised pixels [N, H, W, 3] -> last_hidden_state [N, 1 + registers + patches, D].

    Pixels beyond the last whole patch of a row or column are not seen.
    """

    config: Dinov2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        c = self.config
        x = Dinov2Embeddings(c, self.dtype, name="embeddings")(pixels)
        x = constrain(x, "batch", "tokens", "embed")
        run = scan_layers(Dinov2Layer, c.num_hidden_layers)
        x, _ = run(c, self.dtype, name=run_name("encoder.layer", 0, c.num_hidden_layers))(x)
        return LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="layernorm")(x)
