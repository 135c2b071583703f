"""Layers that all networks share: linear with a LoRA hook, convolution, norms, heads.

Every parameter is created in fp32 and carries logical axis names, which mean nothing until a
mesh and rules are set (`pec_jax.distributed.mesh`). Computation happens in a module's `dtype`;
norms and softmax always in fp32.

Leaf names fix how a tensor is stored on disk (see `pec_jax.weights.convert`): `kernel` of a
linear layer is [in, out], of a convolution [kh, kw, in, out]; `scale` is a norm's weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers as init

from pec_jax.distributed.mesh import at_use, platform
from pec_jax.models import cpu
from pec_jax.models.attention import KEPT

Array = jax.Array
Initializer = Callable[..., Array]

# What the backward pass finds stored, beside the inputs of each block. "dots" keeps the outputs of
# the linear layers and computes attention, norms and activations again. "attention" keeps what the
# MLP starts from and, of a fused kernel on TPU, what its backward pass asks for.
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(KEPT),
}
RUN_NAME = re.compile(r"(.*)\.(\d+):(\d+)")  # a scanned run, see `run_name`


@jax.checkpoint
def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form, elementwise.

    Only x is kept for the gradient: an update of the embedded model is 5% faster for it.
    """
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu-approximate": gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation function that a config.json names.

    Args:
        name: a Hugging Face or diffusers activation name.

    Returns:
        An elementwise function.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def split_heads(x: Array, num_heads: int) -> Array:
    """[N, L, H * D] -> [N, L, H, D]."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: Array) -> Array:
    """[N, L, H, D] -> [N, L, H * D]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def sinusoidal_embedding(t: Array, dim: int, max_period: float = 10000.0) -> Array:
    """Sinusoidal features of a scalar, [cos(t w_i), sin(t w_i)], w_i = max_period^(-2i/dim).

    Args:
        t: scalars [N], timesteps in [0, 1000].
        dim: number of features, even.
        max_period: the slowest wavelength over 2 pi.

    Returns:
        [N, dim] fp32.

    Source: Vaswani et al. 2017, section 3.5; cosines first as SD3 has it.
    """
    half = dim // 2
    # An angle may be thousands of radians, so that the last bit of a frequency shows. These are
    # those of fp32 exponents, as torch has them, without the error of an fp32 exponential.
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp((exponents / np.float32(half)).astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def adapted_product(x: Array, kernel: Array, a: Array, b: Array) -> Array:
    """x (W + a b), in the order that costs less.

    As a rule x W + (x a) b; on a CPU, a small W may be joined with its adapter first.

    Args:
        x: [..., in].
        kernel: W [in, out].
        a: [in, r].
        b: [r, out], the factor alpha / r folded in.

    Returns:
        [..., out].
    """
    if platform() == "cpu" and cpu.joins_adapter(kernel, a.shape[-1]):
        return cpu.product(x, kernel + jnp.dot(a, b))
    return jnp.dot(x, kernel) + jnp.dot(jnp.dot(x, a), b)


def parameter(
    module: nn.Module,
    name: str,
    initializer: Initializer,
    axes: tuple[str | None, ...],
    shape: Sequence[int],
) -> Array:
    """A module's parameter, of which the logical axes are known when it is made.

    Args:
        module: whose `__call__` this is called in.
        name: of the parameter.
        initializer: (key, shape) -> array.
        axes: logical name of each axis.
        shape: of the parameter.

    Returns:
        The array; linen declares the box of its axes, which it takes off itself.
    """
    value: Any = module.param(name, nn.with_logical_partitioning(initializer, axes), shape)
    return value


class Dense(nn.Module):
    """y = x W + b, plus x a b where the collection "lora" holds {"a", "b"} for this layer.

    `a` is [in, r] and `b` [r, out], with the factor alpha/r already folded into `b`
    (`pec_jax.models.lora.scaled`).
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = init.lecun_normal()
    kernel_axes: tuple[str, str] = ("embed", "mlp")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = parameter(
            self, "kernel", self.kernel_init, self.kernel_axes, (x.shape[-1], self.features)
        )
        x = x.astype(self.dtype)
        kernel = at_use(kernel.astype(self.dtype), *self.kernel_axes)
        if self.has_variable("lora", "a"):
            fan_in, fan_out = self.kernel_axes
            a = at_use(self.get_variable("lora", "a").astype(self.dtype), fan_in, "rank")
            b = at_use(self.get_variable("lora", "b").astype(self.dtype), "rank", fan_out)
            y = adapted_product(x, kernel, a, b)
        else:
            y = jnp.dot(x, kernel)
        if self.use_bias:
            bias = parameter(self, "bias", init.zeros, self.kernel_axes[-1:], (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class Conv(nn.Module):
    """2-D convolution of [N, H, W, C], with explicit padding and a bias."""

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Sequence[tuple[int, int]] = ((1, 1), (1, 1))
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = init.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = (None, None, "conv_in", "conv_out")
        kernel = parameter(
            self, "kernel", self.kernel_init, axes, (*self.kernel_size, x.shape[-1], self.features)
        )
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            at_use(kernel.astype(self.dtype), *axes),
            window_strides=self.strides,
            padding=tuple(self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            bias = parameter(self, "bias", init.zeros, ("conv_out",), (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class PatchConv(nn.Module):
    """Convolution whose stride is its kernel size, [N, H, W, C] -> [N, H/p, W/p, features].

    One matrix product over flattened patches; the kernel keeps a convolution's layout.
    """

    features: int
    patch_size: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, channels = x.shape
        p = self.patch_size
        axes = (None, None, "conv_in", "embed")
        kernel = parameter(
            self, "kernel", init.lecun_normal(), axes, (p, p, channels, self.features)
        )
        kernel = at_use(kernel.astype(self.dtype), *axes)
        x = x.astype(self.dtype).reshape(n, height // p, p, width // p, p, channels)
        x = x.swapaxes(2, 3).reshape(n, height // p, width // p, p * p * channels)
        y = jnp.dot(x, kernel.reshape(-1, self.features))
        if self.use_bias:
            bias = parameter(self, "bias", init.zeros, ("embed",), (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class Embed(nn.Module):
    """A table of `num_embeddings` vectors, looked up by integer ids."""

    num_embeddings: int
    features: int
    dtype: jnp.dtype = jnp.float32
    embedding_init: Initializer = init.normal(0.02)

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        table = parameter(
            self,
            "embedding",
            self.embedding_init,
            ("vocab", "embed"),
            (self.num_embeddings, self.features),
        )
        return jnp.take(at_use(table.astype(self.dtype), "vocab", "embed"), ids, axis=0)


def normalize(x: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(var + epsilon) over the last axis, in fp32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with a learned scale and bias."""

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = normalize(x, self.epsilon)
        y = y * parameter(self, "scale", init.ones, ("norm",), x.shape[-1:])
        if self.use_bias:
            y = y + parameter(self, "bias", init.zeros, ("norm",), x.shape[-1:])
        return y.astype(self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis."""

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = parameter(self, "scale", init.ones, ("norm",), x.shape[-1:])

        # What lies between x and y is cheaper to compute again than to keep for the gradient.
        @jax.checkpoint
        def scaled(x: Array, scale: Array) -> Array:
            x = x.astype(jnp.float32)
            x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
            return (x * scale).astype(self.dtype)

        return scaled(x, scale)


class GroupNorm(nn.Module):
    """Group norm of [N, ..., C]: statistics over all positions and C / num_groups channels."""

    num_groups: int
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, channels = x.shape[0], x.shape[-1]

        def group_mean(a: Array) -> Array:
            # Positions first: [N, L, C] stays as it lies in memory, which is twice as fast on CPU.
            means = a.mean(axis=1).reshape(batch, self.num_groups, -1).mean(axis=-1)
            return jnp.repeat(means, channels // self.num_groups, axis=1)[:, None, :]

        y = x.astype(jnp.float32).reshape(batch, -1, channels)
        y = y - group_mean(y)
        y = y * jax.lax.rsqrt(group_mean(jnp.square(y)) + self.epsilon)
        y = y * parameter(self, "scale", init.ones, ("norm",), (channels,))
        y = y + parameter(self, "bias", init.zeros, ("norm",), (channels,))
        return y.reshape(x.shape).astype(self.dtype)


def run_name(prefix: str, start: int, stop: int) -> str:
    """The name of the scanned run of layers prefix.start .. prefix.(stop - 1)."""
    return f"{prefix}.{start}:{stop}"


def expand_runs(path: Sequence[str]) -> list[str]:
    """The dotted torch module names that a module path stands for.

    Args:
        path: module names from the root, without the collection and the leaf.

    Returns:
        One name; or one a layer, in order, if a module of the path is a scanned run.

    Raises:
        ValueError: two runs inside one another, which no network here has.
    """
    runs = [(i, match) for i, part in enumerate(path) if (match := RUN_NAME.fullmatch(part))]
    if not runs:
        return [".".join(path)]
    if len(runs) > 1:
        raise ValueError(f"nested scanned runs in {'/'.join(path)}")
    position, match = runs[0]
    prefix, start, stop = match.group(1), int(match.group(2)), int(match.group(3))
    before, after = list(path[:position]), list(path[position + 1 :])
    return [".".join([*before, f"{prefix}.{i}", *after]) for i in range(start, stop)]


def scan_layers(
    block: type[nn.Module], length: int, *, remat: str = "none", unroll: int | None = None
) -> type[nn.Module]:
    """A run of `length` equal blocks as one scan, so that the program does not grow with depth.

    A program for CPUs has short runs unrolled, see `cpu.unrolled`.

    Args:
        block: a module `block(carry, *broadcast) -> (carry, None)`.
        length: number of layers; parameters are stacked on axis 0, [length, ...].
        remat: what of a block's activations the backward pass computes again, of `REMAT`.
        unroll: layers per loop iteration; it changes speed only. The platform's choice by default.

    Returns:
        A module class of the same signature as `block`; name its instance by `run_name`.
    """
    if unroll is None:
        unroll = cpu.unrolled(length) if platform() == "cpu" else 1
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        length=length,
        in_axes=nn.broadcast,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
