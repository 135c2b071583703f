"""The T5 encoder: relative position biases, RMS norms, no biases, no scaled logits.

The same network as transformers' `T5EncoderModel`, in both its forms: ReLU feed-forward (T5) and
gated GELU (T5 1.1, which SD3 and FLUX use).

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer", section 2.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers as init

from pec_jax.distributed.mesh import constrain
from pec_jax.models import hf_config
from pec_jax.models.attention import attention
from pec_jax.models.layers import (
    Dense,
    Embed,
    RMSNorm,
    activation,
    merge_heads,
    run_name,
    scan_layers,
    split_heads,
)

Array = jax.Array

# The token table is `shared.weight`; some files hold it a second time under this name.
IGNORED_TENSORS = (r"encoder\.embed_tokens\.weight",)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The encoder's part of a config.json; defaults are those of transformers."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self) -> None:
        parts = self.feed_forward_proj.split("-")
        if len(parts) > 2 or (len(parts) == 2 and parts[0] != "gated"):
            raise ValueError(
                f"feed_forward_proj = {self.feed_forward_proj!r} is not supported; "
                "it must be an activation's name, or 'gated-' and an activation's name"
            )
        hf_config.check_activation("feed_forward_proj", self.act)
        exact = self.relative_attention_num_buckets // 4  # distances with a bucket of their own
        if self.relative_attention_max_distance <= exact:
            raise ValueError(
                f"relative_attention_max_distance = {self.relative_attention_max_distance} is not "
                f"supported: it must be more than relative_attention_num_buckets / 4 = {exact}"
            )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer multiplies the activation by a second linear map."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def act(self) -> str:
        """The activation; 'gated-gelu' has always meant the tanh approximation."""
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_new"
        return self.feed_forward_proj.split("-")[-1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5Config:
        """Reads the config.json of a T5 model or of its encoder.

        Raises:
            ValueError: another model's config, or an entry that we cannot compute.
        """
        hf_config.check_choice("model_type", values.get("model_type", "t5"), ("t5",))
        return hf_config.select(cls, values)


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Which bias applies between query i and key j: exact near by, logarithmic farther off.

    Half of the buckets serve each direction; of these, half hold one distance each, the rest
    grow geometrically up to `max_distance`, and the last one takes everything beyond.

    Args:
        length: number of tokens L.
        num_buckets: buckets in all, over both directions.
        max_distance: tokens, from where on all distances share a bucket.

    Returns:
        [L, L] int32 (query, key) in [0, num_buckets).

    Source: Raffel et al. 2020, section 2.1.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # fp32, as the published models were trained: a bucket's edge can fall on a whole number.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    bucket = np.where(distance < exact, distance, far)
    return (bucket + half * (offset > 0)).astype(np.int32)


class T5Block(nn.Module):
    """Self-attention, then the feed-forward layer, each around a pre-norm residual."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> tuple[Array, None]:
        h = RMSNorm(self.config.layer_norm_epsilon, dtype=self.dtype, name="layer.0.layer_norm")(x)
        x = x + self._attention(h, bias)
        h = RMSNorm(self.config.layer_norm_epsilon, dtype=self.dtype, name="layer.1.layer_norm")(x)
        x = x + self._feed_forward(h)
        return constrain(x, "batch", "tokens", "embed"), None

    def _attention(self, x: Array, bias: Array) -> Array:
        c, prefix = self.config, "layer.0.SelfAttention"
        inner = c.num_heads * c.d_kv
        # Logits are not divided by sqrt(d_kv): T5 starts its queries that much smaller instead.
        starts = {"q": (c.d_model * c.d_kv) ** -0.5, "k": c.d_model**-0.5, "v": c.d_model**-0.5}
        q, k, v = (
            split_heads(
                self._linear(inner, f"{prefix}.{n}", std, ("embed", "heads"))(x), c.num_heads
            )
            for n, std in starts.items()
        )
        out = merge_heads(attention(q, k, v, bias=bias, scale=1.0))
        return self._linear(c.d_model, f"{prefix}.o", inner**-0.5, ("heads", "embed"))(out)

    def _feed_forward(self, x: Array) -> Array:
        c, prefix = self.config, "layer.1.DenseReluDense"
        names = ("wi_0", "wi_1") if c.gated else ("wi",)
        h, *gates = (
            self._linear(c.d_ff, f"{prefix}.{n}", c.d_model**-0.5, ("embed", "mlp"))(x)
            for n in names
        )
        h = activation(c.act)(constrain(h, "batch", "tokens", "mlp"))
        for gate in gates:
            h = h * gate
        return self._linear(c.d_model, f"{prefix}.wo", c.d_ff**-0.5, ("mlp", "embed"))(h)

    def _linear(self, features: int, name: str, std: float, axes: tuple[str, str]) -> Dense:
        return Dense(
            features,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=init.normal(std),
            kernel_axes=axes,
            name=name,
        )


class T5Encoder(nn.Module):
    """Token ids [N, L] -> hidden states [N, L, D] after the final norm."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_ids: Array, mask: Array | None = None) -> Array:
        """Encodes a batch of token sequences.

        Args:
            token_ids: [N, L] int.
            mask: [N, L], true or 1 for tokens that may be attended to; None (as in SD3 and FLUX)
                attends to padding too. Each row must hold at least one token.

        Returns:
            [N, L, d_model] in the compute dtype.
        """
        c = self.config
        buckets = relative_position_buckets(
            token_ids.shape[-1],
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
        )
        # All layers add the bias that block 0 owns: computed here, once, under its stored name.
        table = Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            self.dtype,
            name="encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        )
        bias = jnp.moveaxis(table(jnp.asarray(buckets)), -1, 0)[None].astype(
            jnp.float32
        )  # [1, H, L, L]
        if mask is not None:
            bias = jnp.where(mask.astype(bool)[:, None, None, :], bias, -jnp.inf)
        # Trained from scratch, unit-variance tokens as T5 has them.
        tokens = Embed(c.vocab_size, c.d_model, self.dtype, init.normal(1.0), name="shared")
        x = constrain(tokens(token_ids), "batch", "tokens", "embed")
        run = scan_layers(T5Block, c.num_layers)
        blocks = run(c, self.dtype, name=run_name("encoder.block", 0, c.num_layers))
        x, _ = blocks(x, bias)
        return RMSNorm(c.layer_norm_epsilon, dtype=self.dtype, name="encoder.final_layer_norm")(x)
