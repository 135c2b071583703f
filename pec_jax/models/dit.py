"""What the transformers of Stable Diffusion 3 and FLUX.1 share: two streams, joined in attention.

Image tokens and text tokens run in streams with weights of their own; a vector made of the
timestep and the pooled text modulates every layer (Peebles & Xie 2023, "Scalable Diffusion Models
with Transformers", section 3.2; Esser et al. 2024, arXiv 2403.03206, figure 2). Module and
parameter names are diffusers'.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers as init

from pec_jax.distributed import mesh as sharding
from pec_jax.models import layers
from pec_jax.models.attention import KEPT, attention

Array = jax.Array
Rotation = tuple[Array, Array]  # cosines and sines [L, head_dim / 2] of the image tokens
TIME_FEATURES = 256  # sinusoidal features of a timestep or a guidance scale, fixed in all models
EPSILON = 1e-6


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
    """The vector that modulates all layers: timestep, perhaps guidance, and pooled text.

    Guidance is an input of models that were distilled from classifier-free guidance.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, timestep: Array, pooled: Array, guidance: Array | None = None) -> Array:
        embedded = self._embed("text_embedder", pooled)
        embedded += self._embed("timestep_embedder", self._features(timestep))
        if guidance is not None:
            embedded += self._embed("guidance_embedder", self._features(guidance))
        return embedded

    def _embed(self, name: str, x: Array) -> Array:
        return EmbeddingMLP(self.features, self.dtype, name=name)(x)

    def _features(self, scalars: Array) -> Array:
        return layers.sinusoidal_embedding(scalars, TIME_FEATURES)


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


def modulate(x: Array, shift: Array, scale: Array, dtype: jnp.dtype) -> Array:
    """LayerNorm(x) * (1 + scale) + shift of [N, L, D]: fp32 inside, then `dtype`."""
    return (layers.normalize(x, EPSILON) * (1.0 + scale) + shift).astype(dtype)


class FeedForward(nn.Module):
    """Linear to 4 D, GELU (tanh form), linear to D."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dim = x.shape[-1]
        x = layers.Dense(4 * dim, dtype=self.dtype, name="net.0.proj")(x)
        x = layers.gelu_tanh(x)
        return layers.Dense(dim, dtype=self.dtype, kernel_axes=("mlp", "embed"), name="net.2")(x)


def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotary position embedding: turns each pair of neighbouring features by its angle.

    Args:
        x: queries or keys [N, L, H, D].
        rotation: cosines and sines [L, D / 2].

    Returns:
        [N, L, H, D] in x's dtype; computed in fp32.

    Source: Su et al. 2021, "RoFormer", equation 34.
    """
    cos, sin = (a[None, :, None, :] for a in rotation)
    even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class JointAttention(nn.Module):
    """Attention over image tokens, or over image and text tokens with projections of their own.

    Without an output projection (`project_out`) the merged heads are returned as they are.
    """

    num_heads: int
    qk_norm: bool
    context_pre_only: bool = False
    project_out: bool = True
    dtype: jnp.dtype = jnp.float32

    def _project(
        self, x: Array, names: tuple[str, str, str], norms: tuple[str, str]
    ) -> list[Array]:
        heads = []
        for name in names:
            dense = layers.Dense(
                x.shape[-1], dtype=self.dtype, kernel_axes=("embed", "heads"), name=name
            )
            heads.append(layers.split_heads(dense(x), self.num_heads))
        if self.qk_norm:
            for i, name in enumerate(norms):
                heads[i] = layers.RMSNorm(EPSILON, self.dtype, name=name)(heads[i])
        return heads

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None = None, rotation: Rotation | None = None
    ) -> tuple[Array, Array | None]:
        length, dim = x.shape[1], x.shape[-1]
        q, k, v = self._project(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if rotation is not None:
            # Text stands at the origin, which turns nothing: only image tokens are rotated.
            images = rotation[0].shape[0]
            q, k = (
                jnp.concatenate([rotate(a[:, :images], rotation), a[:, images:]], axis=1)
                for a in (q, k)
            )
        if context is not None:
            extra = self._project(
                context,
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
            )
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip((q, k, v), extra))
        if self.context_pre_only:
            q = q[:, :length]  # nobody reads what the text tokens attend to in the last layer
        out = layers.merge_heads(attention(q, k, v))
        if not self.project_out:
            return out, None
        axes = ("heads", "embed")
        to_out = layers.Dense(dim, dtype=self.dtype, kernel_axes=axes, name="to_out.0")
        if context is None or self.context_pre_only:
            return to_out(out), None
        to_add_out = layers.Dense(dim, dtype=self.dtype, kernel_axes=axes, name="to_add_out")
        return to_out(out[:, :length]), to_add_out(out[:, length:])


class JointBlock(nn.Module):
    """One layer: joint attention (and, in some layers, image-only attention), then MLPs.

    As SD3.5 has it, the second attention reads the same normalised input as the first. `rotation`
    is FLUX's; SD3 adds its positions to the tokens.
    """

    num_heads: int
    qk_norm: bool
    dual: bool = False
    last: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], conditioning: Array, rotation: Rotation | None = None
    ) -> tuple[tuple[Array, Array], None]:
        x, context = streams  # [N, hw, D], [N, L, D]
        heads, norm, dtype = self.num_heads, self.qk_norm, self.dtype
        parts = Modulation(9 if self.dual else 6, dtype, name="norm1")(conditioning)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts[:6]
        if self.last:
            c_scale, c_shift = Modulation(2, dtype, name="norm1_context")(conditioning)
        else:
            c_parts = Modulation(6, dtype, name="norm1_context")(conditioning)
            c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_parts

        attend = JointAttention(heads, norm, context_pre_only=self.last, dtype=dtype, name="attn")
        attended, attended_context = attend(
            modulate(x, shift, scale, dtype), modulate(context, c_shift, c_scale, dtype), rotation
        )
        change = gate * attended
        if self.dual:
            shift_2, scale_2, gate_2 = parts[6:]
            attend_2 = JointAttention(heads, norm, dtype=dtype, name="attn2")
            change = change + gate_2 * attend_2(modulate(x, shift_2, scale_2, dtype))[0]
        x = checkpoint_name(x + change, KEPT)
        x = x + gate_mlp * FeedForward(dtype, name="ff")(modulate(x, shift_mlp, scale_mlp, dtype))
        x = sharding.constrain(x, "batch", "tokens", "embed")
        if attended_context is None:  # of the last block, whose context nothing reads
            return (x, context), None
        context = checkpoint_name(context + c_gate * attended_context, KEPT)
        mlp_input = modulate(context, c_shift_mlp, c_scale_mlp, dtype)
        context = context + c_gate_mlp * FeedForward(dtype, name="ff_context")(mlp_input)
        return (x, sharding.constrain(context, "batch", "tokens", "embed")), None


def embed_context(tokens: Array, features: int, dtype: jnp.dtype) -> Array:
    """Text tokens [N, L, *] -> [N, L, features]; called inside a transformer's `__call__`."""
    dense = layers.Dense(
        features, dtype=dtype, kernel_axes=("mlp", "embed"), name="context_embedder"
    )
    return dense(tokens)


def project_out(x: Array, conditioning: Array, features: int, dtype: jnp.dtype) -> Array:
    """The last modulated norm and linear layer; called inside a transformer's `__call__`."""
    scale, shift = Modulation(2, dtype, name="norm_out")(conditioning)
    dense = layers.Dense(
        features,
        dtype=dtype,
        kernel_init=init.zeros,
        kernel_axes=("embed", "conv_out"),
        name="proj_out",
    )
    return dense(modulate(x, shift, scale, dtype))


def check_text(tokens: Array, joint_dim: int, pooled: Array, pooled_dim: int) -> None:
    """Raises ValueError where text embeddings are not as wide as a transformer takes them."""
    if tokens.shape[-1] != joint_dim:
        raise ValueError(
            f"text tokens are {tokens.shape[-1]} wide, the transformer takes {joint_dim}"
        )
    if pooled.shape[-1] != pooled_dim:
        raise ValueError(
            f"the pooled text embedding is {pooled.shape[-1]} wide, the transformer takes "
            f"{pooled_dim}"
        )
