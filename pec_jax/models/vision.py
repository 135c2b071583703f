"""Vision transformers: one network for the image encoders of CLIP, DINO, SigLIP and BLIP.

    patches -> [class token, registers, patches] + positions -> layers -> norm -> one vector

What tells one model from another is a `VisionConfig`; `vision_kinds` reads it from a config.json.
Tensors have the names that published checkpoints hold.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; Darcet et al. 2023, "Vision
Transformers Need Registers"; Zhai et al. 2022, "Scaling Vision Transformers" (attention pooling).
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers as init

from pec_jax.distributed.mesh import at_use, constrain
from pec_jax.models.attention import attention
from pec_jax.models.encoder import LayerConfig, Rotation, mlp, run_layers
from pec_jax.models.layers import (
    Conv,
    Dense,
    Embed,
    LayerNorm,
    merge_heads,
    parameter,
    split_heads,
)
from pec_jax.models.resampling import cubic_weights, resize_weights

Array = jax.Array

_NORMAL = init.truncated_normal(0.02)
RESIZED, SMOOTHED, ROTARY = "resized", "smoothed", "rotary"


@dataclasses.dataclass(frozen=True)
class VisionNames:
    """What a model's files call the parts around its layers.

    Attributes:
        patches: the convolution over patches.
        class_token: "" for a model without one.
        registers: tokens without a position, between the class token and the patches.
        positions: "" where they are rotary.
        modules: whether positions are stored as an embedding module's table [L, D] and the class
            token as a vector [D], as CLIP and SigLIP have it; else both are [1, ., D].
        first_norm: before the layers; "" for none.
        layers: prefix of the layers.
        last_norm: after them.
    """

    patches: str
    class_token: str
    registers: str
    positions: str
    layers: str
    last_norm: str
    first_norm: str = ""
    modules: bool = False


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer.

    Attributes:
        layer: of all layers.
        depth: their number.
        names: of the other tensors.
        image_size: pixels a side that the stored positions are of.
        patch_size: pixels a side.
        num_channels: of an image.
        patch_bias: whether the convolution has one.
        num_registers: their number.
        positions: `RESIZED`, interpolated where an image is not of `image_size`; `SMOOTHED`, with
            a filter that widens where the grid shrinks, as Pillow's does; or `ROTARY`.
        rope_theta: base of the rotary frequencies.
        pooling: what an image's features are: of the "class" token, or by "attention".
    """

    layer: LayerConfig
    depth: int
    names: VisionNames
    image_size: int
    patch_size: int
    num_channels: int = 3
    patch_bias: bool = True
    num_registers: int = 0
    positions: str = RESIZED
    rope_theta: float = 100.0
    pooling: str = "class"

    @property
    def width(self) -> int:
        """D, of a token and of the features."""
        return self.layer.width

    @property
    def grid(self) -> int:
        """Patches a side that the stored positions are of."""
        return self.image_size // self.patch_size


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


def axial_rotation(height: int, width: int, head_dim: int, theta: float) -> Rotation:
    """Rotary positions of a grid of patches, from the centres' coordinates in [-1, 1].

    angle[p, (axis, i)] = 2 pi c_axis(p) theta^(-4 i / head_dim), i < head_dim / 4

    Args:
        height: patches.
        width: patches.
        head_dim: of an attention head, a multiple of 4.
        theta: base of the frequencies.

    Returns:
        For [height * width] patches, row by row; the rows' angles before the columns'.

    Source: Siméoni et al. 2025, DINOv3 (arXiv 2508.10104), section 3.2.
    """
    frequencies = theta ** -(np.arange(head_dim // 4) * 4.0 / head_dim)
    rows, columns = ((np.arange(n) + 0.5) / n * 2.0 - 1.0 for n in (height, width))
    centres = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = 2.0 * math.pi * centres[:, :, None] * frequencies  # [P, 2, head_dim / 4]
    angles = np.tile(angles.reshape(len(centres), -1), 2)
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return Rotation(cos, sin)


class VisionTower(nn.Module):
    """Normalised pixels [N, H, W, C] -> features [N, D], or with `tokens` all tokens [N, L, D].

    Both are after the last norm. Pixels beyond the last whole patch of a row or column are not
    seen.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32
    tokens: bool = False

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        c = self.config
        x, rotation = self._embed(pixels)
        if c.names.first_norm:
            x = self._norm(c.names.first_norm)(x)
        x = constrain(x, "batch", "tokens", "embed")
        _, x = run_layers(c.layer, c.depth, c.names.layers, x, rotation=rotation)
        if self.tokens:
            return self._norm(c.names.last_norm)(x)
        if c.pooling == "class":
            return self._norm(c.names.last_norm)(x[:, 0])
        return AttentionPool(c.layer, self.dtype, name="head")(self._norm(c.names.last_norm)(x))

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.config.layer.epsilon, dtype=self.dtype, name=name)

    def _embed(self, pixels: Array) -> tuple[Array, Rotation | None]:
        """Tokens [N, L, D] with their positions, and what rotates them in every layer."""
        c = self.config
        self._check(pixels.shape[1:])
        patch = (c.patch_size, c.patch_size)
        x = Conv(
            c.width,
            patch,
            patch,
            padding=((0, 0), (0, 0)),
            use_bias=c.patch_bias,
            dtype=self.dtype,
            name=c.names.patches,
        )(pixels)
        n, rows, columns = x.shape[:3]
        x = x.reshape(n, -1, c.width)  # [N, patches, D]
        prefix = [self._tokens(name, count) for name, count in self._prefix()]
        rotation = None
        if c.positions == ROTARY:
            head_dim = c.width // c.layer.heads
            rotation = axial_rotation(rows, columns, head_dim, c.rope_theta)
        else:
            table = self._positions()
            if c.names.class_token:
                prefix[0], table = prefix[0] + table[:1], table[1:]
            x = x + interpolate_positions(table, rows, columns, c.positions == SMOOTHED)
        prefix = [jnp.broadcast_to(token, (n, *token.shape)) for token in prefix]
        return jnp.concatenate([*prefix, x], axis=1), rotation

    def _prefix(self) -> list[tuple[str, int]]:
        """Name and number of the tokens before the patches."""
        names, found = self.config.names, []
        if names.class_token:
            found.append((names.class_token, 1))
        if self.config.num_registers:
            found.append((names.registers, self.config.num_registers))
        return found

    def _tokens(self, name: str, count: int) -> Array:
        """Learned tokens [count, D]."""
        c = self.config
        if c.names.modules:  # CLIP's class token
            start = init.normal(c.width**-0.5)
            return self._stored(name, start, ("embed",), (c.width,))[None]
        axes = (None, None, "embed")
        return self._stored(name, _NORMAL, axes, (1, count, c.width))[0]

    def _positions(self) -> Array:
        """The stored positions [class token and patches, D]."""
        c = self.config
        length = c.grid**2 + bool(c.names.class_token)
        if c.names.modules:
            table = Embed(length, c.width, self.dtype, name=c.names.positions)
            return table(jnp.arange(length))
        return self._tokens(c.names.positions, length)

    def _stored(
        self, name: str, start: init.Initializer, axes: tuple, shape: tuple[int, ...]
    ) -> Array:
        value = parameter(self, name, start, axes, shape)
        return at_use(jnp.asarray(value, self.dtype), *axes)

    def _check(self, shape: tuple[int, ...]) -> None:
        c = self.config
        if shape[2] != c.num_channels or min(shape[:2]) < c.patch_size:
            raise ValueError(
                f"images of shape {shape}, but this encoder expects {c.num_channels} channels and "
                f"at least {c.patch_size} pixels a side"
            )


class AttentionPool(nn.Module):
    """SigLIP's head: a learned query attends to all tokens [N, L, D]; an MLP follows -> [N, D]."""

    config: LayerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        width = c.width
        query = self._stored("probe", (None, None, "embed"), (1, 1, width))
        kernel = self._stored("attention.in_proj_weight", ("heads", "embed"), (3 * width, width))
        bias = self._stored("attention.in_proj_bias", ("heads",), (3 * width,), init.zeros)
        query = jnp.broadcast_to(query, (x.shape[0], 1, width))
        # torch's MultiheadAttention keeps the three projections in one matrix [out, in].
        q, k, v = (
            split_heads(jnp.dot(a, part.T) + b, c.heads)
            for a, part, b in zip((query, x, x), jnp.split(kernel, 3), jnp.split(bias, 3))
        )
        out = Dense(
            width, dtype=self.dtype, kernel_axes=("heads", "embed"), name="attention.out_proj"
        )
        y = out(merge_heads(attention(q, k, v)))
        h = LayerNorm(c.epsilon, dtype=self.dtype, name="layernorm")(y)
        return (y + mlp(c, h))[:, 0]

    def _stored(
        self, name: str, axes: tuple, shape: tuple[int, ...], start: init.Initializer = _NORMAL
    ) -> Array:
        return at_use(jnp.asarray(parameter(self, name, start, axes, shape), self.dtype), *axes)
