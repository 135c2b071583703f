"""MMDiT, the transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206).

Image tokens and text tokens run in two streams with weights of their own, joined in every
attention. Module and parameter names are diffusers' (`SD3Transformer2DModel`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers as init

from pec_jax.models import layers

Array = jax.Array
TIME_FEATURES = 256  # sinusoidal features of the timestep, fixed in SD3
MAX_LAYERS = 1000  # a damaged config must not make us enumerate forever


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """The fields of transformer/config.json; `sample_size` is in latent pixels."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MMDiTConfig:
        """Reads a diffusers config; keys starting with "_" are notes and are passed over.

        Raises:
            ValueError: a key or a value that this network does not implement.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in config.items() if not k.startswith("_")}
        if unknown := sorted(set(given) - known):
            key = unknown[0]
            raise ValueError(
                f"transformer config: unknown key {key!r} (value {given[key]!r}); "
                f"known: {', '.join(sorted(known))}"
            )
        given["dual_attention_layers"] = tuple(given.get("dual_attention_layers") or ())
        if given.get("out_channels") is None:
            given["out_channels"] = given.get("in_channels", cls.in_channels)
        return cls(**given)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"transformer config: {field.name} {value} must be at least 1")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"transformer config: num_layers {self.num_layers} > {MAX_LAYERS}")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"transformer config: qk_norm {self.qk_norm!r} is not None, rms_norm")
        if self.caption_projection_dim != self.inner_dim:
            raise ValueError(
                f"transformer config: caption_projection_dim {self.caption_projection_dim} must be "
                f"num_attention_heads * attention_head_dim = {self.inner_dim}"
            )
        if self.inner_dim % 4:
            raise ValueError(
                f"transformer config: num_attention_heads * attention_head_dim = {self.inner_dim} "
                "must be a multiple of 4 (sine and cosine of two axes)"
            )
        outside = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"transformer config: dual_attention_layers {outside} are not layers "
                f"0..{self.num_layers - 1}"
            )

    def runs(self) -> list[tuple[int, int, bool, bool]]:
        """Runs of equal layers, as (start, stop, has dual attention, is the last layer)."""
        runs: list[tuple[int, int, bool, bool]] = []
        for i in range(self.num_layers):
            dual, last = i in self.dual_attention_layers, i == self.num_layers - 1
            if runs and runs[-1][2:] == (dual, last):
                runs[-1] = (runs[-1][0], i + 1, dual, last)
            else:
                runs.append((i, i + 1, dual, last))
        return runs


def sincos_position_table(dim: int, size: int, base_size: int) -> Array:
    """Fixed 2-D sine-cosine position embedding; the first half of the features is the column.

    Args:
        dim: features D, a multiple of 4.
        size: rows and columns of the table.
        base_size: positions run over [0, base_size), so that a table of any size spans the
            grid that the model was trained on.

    Returns:
        [1, size * size, dim] fp32.
    """
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    # Positions are rounded to fp32 before the product, as in the checkpoints' own tables.
    position = np.arange(size, dtype=np.float32) / np.float32(size / base_size)
    angles = np.outer(position.astype(np.float64), omega)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    column = jnp.broadcast_to(axis[None, :, :], (size, size, dim // 2))
    row = jnp.broadcast_to(axis[:, None, :], (size, size, dim // 2))
    return jnp.concatenate([column, row], axis=-1).reshape(1, size * size, dim)


class PatchEmbed(nn.Module):
    """Patches to tokens, plus the centre crop of the position table."""

    config: MMDiTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        size = c.pos_embed_max_size
        base = c.sample_size // c.patch_size
        table = self.variable(
            "buffers", "pos_embed", sincos_position_table, c.inner_dim, size, base
        ).value
        x = layers.PatchConv(c.inner_dim, c.patch_size, dtype=self.dtype, name="proj")(x)
        n, rows, columns, dim = x.shape
        if rows > size or columns > size:
            raise ValueError(
                f"latents of {rows} x {columns} patches exceed pos_embed_max_size {size}: "
                "ask for a smaller image"
            )
        top, left = (size - rows) // 2, (size - columns) // 2
        table = table.reshape(size, size, dim)[top : top + rows, left : left + columns]
        return (x + table.astype(self.dtype)).reshape(n, rows * columns, dim)


class EmbeddingMLP(nn.Module):
    """linear_1, SiLU, linear_2."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = layers.Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        return layers.Dense(
            self.features, dtype=self.dtype, kernel_axes=("mlp", "embed"), name="linear_2"
        )(jax.nn.silu(x))


class TimeTextEmbed(nn.Module):
    """The vector that modulates all layers: timestep features plus projected pooled text."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, timestep: Array, pooled: Array) -> Array:
        t = layers.sinusoidal_embedding(timestep, TIME_FEATURES)
        time = EmbeddingMLP(self.features, self.dtype, name="timestep_embedder")(t)
        return time + EmbeddingMLP(self.features, self.dtype, name="text_embedder")(pooled)


class Modulation(nn.Module):
    """adaLN: `parts` vectors [N, 1, D] from the (already SiLU-activated) conditioning vector.

    Starts at zero, so that a new network's residual branches start closed (adaLN-Zero).
    """

    parts: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, conditioning: Array) -> list[Array]:
        features = self.parts * conditioning.shape[-1]
        dense = layers.Dense(features, dtype=self.dtype, kernel_init=init.zeros, name="linear")
        return jnp.split(dense(conditioning)[:, None, :], self.parts, axis=-1)


def modulate(normalized: Array, shift: Array, scale: Array, dtype: jnp.dtype) -> Array:
    """normalized * (1 + scale) + shift, from fp32 [N, L, D] to `dtype`."""
    return (normalized * (1.0 + scale) + shift).astype(dtype)


class FeedForward(nn.Module):
    """Linear to 4 D, GELU (tanh form), linear to D."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dim = x.shape[-1]
        x = layers.Dense(4 * dim, dtype=self.dtype, name="net.0.proj")(x)
        x = jax.nn.gelu(x, approximate=True)
        return layers.Dense(dim, dtype=self.dtype, kernel_axes=("mlp", "embed"), name="net.2")(x)


class JointAttention(nn.Module):
    """Attention over image tokens, or over image and text tokens with projections of their own."""

    config: MMDiTConfig
    context_pre_only: bool = False
    dtype: jnp.dtype = jnp.float32

    def _project(
        self, x: Array, names: tuple[str, str, str], norms: tuple[str, str]
    ) -> list[Array]:
        c = self.config
        heads = []
        for name in names:
            dense = layers.Dense(
                c.inner_dim, dtype=self.dtype, kernel_axes=("embed", "heads"), name=name
            )
            heads.append(layers.split_heads(dense(x), c.num_attention_heads))
        if c.qk_norm == "rms_norm":
            for i, name in enumerate(norms):
                heads[i] = layers.RMSNorm(1e-6, self.dtype, name=name)(heads[i])
        return heads

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> tuple[Array, Array | None]:
        length = x.shape[1]
        q, k, v = self._project(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if context is not None:
            extra = self._project(
                context,
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
            )
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip((q, k, v), extra))
        if self.context_pre_only:
            q = q[:, :length]  # nobody reads what the text tokens attend to in the last layer
        out = layers.merge_heads(layers.attention(q, k, v))
        dim, axes = self.config.inner_dim, ("heads", "embed")
        to_out = layers.Dense(dim, dtype=self.dtype, kernel_axes=axes, name="to_out.0")
        if context is None or self.context_pre_only:
            return to_out(out), None
        to_add_out = layers.Dense(dim, dtype=self.dtype, kernel_axes=axes, name="to_add_out")
        return to_out(out[:, :length]), to_add_out(out[:, length:])


class JointBlock(nn.Module):
    """One layer: joint attention (and, in some layers, image-only attention), then MLPs.

    As SD3.5 has it, the second attention reads the same normalised input as the first.
    """

    config: MMDiTConfig
    dual: bool = False
    last: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], conditioning: Array
    ) -> tuple[tuple[Array, Array], None]:
        x, context = streams  # [N, hw, D], [N, L, D]
        dtype = self.dtype
        parts = Modulation(9 if self.dual else 6, dtype, name="norm1")(conditioning)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts[:6]
        normalized = layers.normalize(x, 1e-6)
        normalized_context = layers.normalize(context, 1e-6)
        if self.last:
            c_scale, c_shift = Modulation(2, dtype, name="norm1_context")(conditioning)
        else:
            c_parts = Modulation(6, dtype, name="norm1_context")(conditioning)
            c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_parts

        attend = JointAttention(self.config, self.last, dtype, name="attn")
        attended, attended_context = attend(
            modulate(normalized, shift, scale, dtype),
            modulate(normalized_context, c_shift, c_scale, dtype),
        )
        x = x + gate * attended
        if self.dual:
            shift_2, scale_2, gate_2 = parts[6:]
            attend_2 = JointAttention(self.config, dtype=dtype, name="attn2")
            x = x + gate_2 * attend_2(modulate(normalized, shift_2, scale_2, dtype))[0]

        mlp_input = modulate(layers.normalize(x, 1e-6), shift_mlp, scale_mlp, dtype)
        x = x + gate_mlp * FeedForward(dtype, name="ff")(mlp_input)
        x = layers.constrain(x, "batch", "tokens", "embed")
        if self.last:
            return (x, context), None
        context = context + c_gate * attended_context
        mlp_input = modulate(layers.normalize(context, 1e-6), c_shift_mlp, c_scale_mlp, dtype)
        context = context + c_gate_mlp * FeedForward(dtype, name="ff_context")(mlp_input)
        return (x, layers.constrain(context, "batch", "tokens", "embed")), None


class MMDiT(nn.Module):
    """The velocity field of SD3: (x_t, sigma, text) -> v = eps - x_0."""

    config: MMDiTConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, timestep: Array, tokens: Array, pooled: Array) -> Array:
        """Predicts the velocity.

        Args:
            x: latents x_t [N, h, w, C]; h and w are multiples of the patch size.
            timestep: 1000 * sigma [N], in [0, 1000].
            tokens: text token embeddings [N, L, joint_attention_dim].
            pooled: pooled text embedding [N, pooled_projection_dim].

        Returns:
            Velocity [N, h, w, out_channels] in x's dtype.

        Raises:
            ValueError: latents or text of a shape that the config excludes.
        """
        c = self.config
        _check_inputs(c, x, tokens, pooled)
        image = PatchEmbed(c, self.dtype, name="pos_embed")(x)
        embed = TimeTextEmbed(c.inner_dim, self.dtype, name="time_text_embed")
        conditioning = jax.nn.silu(embed(timestep, pooled))  # [N, D]; every layer wants it so
        context = layers.Dense(
            c.inner_dim, dtype=self.dtype, kernel_axes=("mlp", "embed"), name="context_embedder"
        )(tokens)
        streams = (image, context)
        for start, stop, dual, last in c.runs():
            run = layers.scan_layers(JointBlock, stop - start, remat=self.remat)(
                c, dual, last, self.dtype, name=layers.run_name("transformer_blocks", start, stop)
            )
            streams, _ = run(streams, conditioning)
        scale, shift = Modulation(2, self.dtype, name="norm_out")(conditioning)
        out = modulate(layers.normalize(streams[0], 1e-6), shift, scale, self.dtype)
        out = layers.Dense(
            c.patch_size**2 * c.out_channels,
            dtype=self.dtype,
            kernel_init=init.zeros,
            kernel_axes=("embed", "conv_out"),
            name="proj_out",
        )(out)
        return unpatchify(out, x.shape[1], x.shape[2], c.patch_size).astype(x.dtype)


def _check_inputs(config: MMDiTConfig, x: Array, tokens: Array, pooled: Array) -> None:
    p = config.patch_size
    if x.ndim != 4 or x.shape[-1] != config.in_channels or x.shape[1] % p or x.shape[2] % p:
        raise ValueError(
            f"latents must be [N, h, w, {config.in_channels}] with h and w multiples of {p}, "
            f"not {x.shape}"
        )
    if tokens.shape[-1] != config.joint_attention_dim:
        raise ValueError(
            f"text tokens are {tokens.shape[-1]} wide, the transformer takes "
            f"{config.joint_attention_dim}"
        )
    if pooled.shape[-1] != config.pooled_projection_dim:
        raise ValueError(
            f"the pooled text embedding is {pooled.shape[-1]} wide, the transformer takes "
            f"{config.pooled_projection_dim}"
        )


def unpatchify(tokens: Array, height: int, width: int, patch_size: int) -> Array:
    """[N, (h/p)(w/p), p p C] -> [N, h, w, C]."""
    n, p = tokens.shape[0], patch_size
    x = tokens.reshape(n, height // p, width // p, p, p, -1)
    return x.swapaxes(2, 3).reshape(n, height, width, -1)
