"""The pre-norm transformer layer of CLIP, ViT, DINO, SigLIP and BLIP's image encoder.

These models differ in a few switches, and in how their files name the parts of a layer; both are
data here (`LayerConfig`, `LayerNames`).

Source: Vaswani et al. 2017, "Attention Is All You Need"; pre-norm as in Dosovitskiy et al. 2021,
"An Image is Worth 16x16 Words".
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as init

from pec_jax.distributed.mesh import constrain
from pec_jax.models.attention import attention
from pec_jax.models.layers import (
    Dense,
    LayerNorm,
    activation,
    merge_heads,
    parameter,
    run_name,
    scan_layers,
    split_heads,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LayerNames:
    """What a model's files call the parts of a layer.

    Attributes:
        norms: before the attention and before the MLP.
        projections: of queries, keys and values; a single name where they are one matrix.
        output: of the attention.
        up: the first linear layer of the MLP. Two names are a gate and a value.
        down: the last.
        scales: learned scales of the two residual branches; () for a model without.
    """

    norms: tuple[str, str]
    projections: tuple[str, ...]
    output: str
    up: tuple[str, ...]
    down: str
    scales: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One layer.

    Attributes:
        width: D, of a token.
        heads: of the attention.
        mlp_width: hidden width of the MLP.
        activation: its name in config.json.
        epsilon: of the layer norms.
        names: of the tensors.
        biases: whether queries, keys and values have one.
        output_bias: whether the attention's output has one.
        mlp_bias: whether the MLP's layers have one.
        gated: whether the MLP multiplies the activation by a second linear map; where `names.up`
            is a single name, both maps are one matrix, the gate first.
    """

    width: int
    heads: int
    mlp_width: int
    activation: str
    epsilon: float
    names: LayerNames
    biases: tuple[bool, bool, bool] = (True, True, True)
    output_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False


class Rotation(NamedTuple):
    """Rotary positions of the last P tokens; those before them are not rotated."""

    cos: Array  # [P, D / heads] fp32
    sin: Array  # [P, D / heads] fp32

    def __call__(self, x: Array) -> Array:
        """Rotates [N, L, H, D / H]; the i-th number of a head and the (i + D / 2H)-th are a pair.

        Source: Su et al. 2021, RoFormer (arXiv 2104.09864), eq. 34.
        """
        start = x.shape[1] - self.cos.shape[0]
        rest = x[:, start:].astype(jnp.float32)
        first, second = jnp.split(rest, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
        rest = rest * self.cos[:, None] + turned * self.sin[:, None]
        return jnp.concatenate([x[:, :start], rest.astype(x.dtype)], axis=1)


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    It carries its own input along as the first of a pair: after a run of layers the pair is
    (input of the last layer, its output), which gives hidden_states[-2] without stacking the
    others.
    """

    config: LayerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Array], bias: Array | None, rotation: Rotation | None
    ) -> tuple[tuple[Array, Array], None]:
        c = self.config
        _, x = carry  # [N, L, D]
        h = LayerNorm(c.epsilon, dtype=self.dtype, name=c.names.norms[0])(x)
        y = x + self._scaled(0, self._attention(h, bias, rotation))
        h = LayerNorm(c.epsilon, dtype=self.dtype, name=c.names.norms[1])(y)
        y = y + self._scaled(1, mlp(c, h))
        return (x, constrain(y, "batch", "tokens", "embed")), None

    def _attention(self, h: Array, bias: Array | None, rotation: Rotation | None) -> Array:
        c = self.config
        q, k, v = (split_heads(a, c.heads) for a in self._projections(h))
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        out = Dense(
            c.width,
            use_bias=c.output_bias,
            dtype=self.dtype,
            kernel_axes=("heads", "embed"),
            name=c.names.output,
        )
        return out(merge_heads(attention(q, k, v, bias=bias)))

    def _projections(self, h: Array) -> list[Array]:
        c, axes = self.config, ("embed", "heads")
        if len(c.names.projections) == 1:
            joined = Dense(
                3 * c.width, dtype=self.dtype, kernel_axes=axes, name=c.names.projections[0]
            )
            return jnp.split(joined(h), 3, axis=-1)
        return [
            Dense(c.width, use_bias=bias, dtype=self.dtype, kernel_axes=axes, name=name)(h)
            for name, bias in zip(c.names.projections, c.biases)
        ]

    def _scaled(self, branch: int, h: Array) -> Array:
        names = self.config.names.scales
        if not names:
            return h
        scale = parameter(self, names[branch], init.ones, ("embed",), (self.config.width,))
        return jnp.asarray(scale, self.dtype) * h


def mlp(c: LayerConfig, h: Array) -> Array:
    """The MLP of a layer, on normalised tokens [N, L, D].

    To be called inside a compact method, whose module then owns the linear layers.
    """

    def linear(features: int, name: str, axes: tuple[str, str], x: Array) -> Array:
        return Dense(features, c.mlp_bias, h.dtype, kernel_axes=axes, name=name)(x)

    act, up = activation(c.activation), ("embed", "mlp")
    if c.gated and len(c.names.up) == 1:
        parts = jnp.split(linear(2 * c.mlp_width, c.names.up[0], up, h), 2, axis=-1)
    else:
        parts = [linear(c.mlp_width, name, up, h) for name in c.names.up]
    h = act(constrain(parts[0], "batch", "tokens", "mlp"))
    if c.gated:
        h = h * parts[1]
    return linear(c.width, c.names.down, ("mlp", "embed"), h)


def run_layers(
    config: LayerConfig,
    depth: int,
    prefix: str,
    x: Array,
    *,
    bias: Array | None = None,
    rotation: Rotation | None = None,
) -> tuple[Array, Array]:
    """All layers of an encoder, scanned.

    To be called inside a compact method, whose module then owns the layers.

    Args:
        config: of each layer.
        depth: number of layers.
        prefix: of their names; layer i is PREFIX.i.
        x: tokens [N, L, D].
        bias: added to the attention's logits, broadcastable to [N, H, L, L]; -inf masks a key.
        rotation: of queries and keys, where positions are rotary.

    Returns:
        The input of the last layer and its output, [N, L, D] each.
    """
    run = scan_layers(EncoderLayer, depth)
    layers = run(config, x.dtype, name=run_name(prefix, 0, depth))
    carry, _ = layers((x, x), bias, rotation)
    return carry
