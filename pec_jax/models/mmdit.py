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

from pec_jax.distributed import mesh as sharding
from pec_jax.models import dit, layers

Array = jax.Array
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
        """Reads a diffusers config; keys starting with "_" are notes and are ignored.

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
        if self.sample_size < self.patch_size:
            raise ValueError(
                f"transformer config: sample_size {self.sample_size} must be at least patch_size "
                f"{self.patch_size}"
            )
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
        make_table = nn.with_logical_partitioning(sincos_position_table, (None, None, "embed"))
        buffer = self.variable("buffers", "pos_embed", make_table, c.inner_dim, size, base)
        table: Any = buffer.value  # linen declares the box of its axes, which it has taken off
        x = layers.PatchConv(c.inner_dim, c.patch_size, dtype=self.dtype, name="proj")(x)
        n, rows, columns, dim = x.shape
        if rows > size or columns > size:
            raise ValueError(
                f"latents of {rows} x {columns} patches exceed pos_embed_max_size {size}: "
                "ask for a smaller image"
            )
        top, left = (size - rows) // 2, (size - columns) // 2
        table = table.reshape(size, size, dim)[top : top + rows, left : left + columns]
        table = sharding.at_use(table.astype(self.dtype), None, None, "embed")
        return (x + table).reshape(n, rows * columns, dim)


class MMDiT(nn.Module):
    """The velocity field of SD3: (x_t, sigma, text) -> v = eps - x_0."""

    config: MMDiTConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

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
        embed = dit.TimeTextEmbed(c.inner_dim, self.dtype, name="time_text_embed")
        conditioning = jax.nn.silu(embed(timestep, pooled))  # [N, D]; every layer wants it so
        streams = (image, dit.embed_context(tokens, c.inner_dim, self.dtype))
        for start, stop, dual, last in c.runs():
            block = layers.scan_layers(dit.JointBlock, stop - start, remat=self.remat)(
                c.num_attention_heads,
                c.qk_norm is not None,
                dual,
                last,
                self.dtype,
                name=layers.run_name("transformer_blocks", start, stop),
            )
            streams, _ = block(streams, conditioning)
        features = c.patch_size**2 * c.out_channels
        out = dit.project_out(streams[0], conditioning, features, self.dtype)
        return unpatchify(out, x.shape[1], x.shape[2], c.patch_size).astype(x.dtype)


def _check_inputs(config: MMDiTConfig, x: Array, tokens: Array, pooled: Array) -> None:
    p = config.patch_size
    if x.ndim != 4 or x.shape[-1] != config.in_channels or x.shape[1] % p or x.shape[2] % p:
        raise ValueError(
            f"latents must be [N, h, w, {config.in_channels}] with h and w multiples of {p}, "
            f"not {x.shape}"
        )
    dit.check_text(tokens, config.joint_attention_dim, pooled, config.pooled_projection_dim)


def unpatchify(tokens: Array, height: int, width: int, patch_size: int) -> Array:
    """[N, (h/p)(w/p), p p C] -> [N, h, w, C]."""
    n, p = tokens.shape[0], patch_size
    x = tokens.reshape(n, height // p, width // p, p, p, -1)
    return x.swapaxes(2, 3).reshape(n, height, width, -1)
