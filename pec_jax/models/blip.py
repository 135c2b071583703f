"""BLIP's image-grounded text encoder: a BERT whose layers also attend to an image.

The network of transformers' `BlipForImageTextRetrieval` up to `question_embeds`, with its names.
Unlike the vision transformers it normalises after each residual (post-norm).

Source: Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training" (arXiv 2201.12086),
section 3.1; Devlin et al. 2019, "BERT".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pec_jax.distributed.mesh import constrain
from pec_jax.models import hf_config
from pec_jax.models.attention import attention
from pec_jax.models.layers import (
    Dense,
    Embed,
    LayerNorm,
    activation,
    merge_heads,
    run_name,
    scan_layers,
    split_heads,
)
from pec_jax.models.vision import VisionConfig, VisionTower
from pec_jax.models.vision_kinds import read_vision_config

Array = jax.Array

# Heads for other tasks, and a buffer that holds 0, 1, 2, ...
IGNORED_TENSORS = (
    r"(vision_proj|text_proj|itm_head)\..*",
    r"text_encoder\.embeddings\.position_ids",
)


@dataclasses.dataclass(frozen=True)
class BlipTextConfig:
    """The text encoder's part of a config.json; defaults are those of transformers."""

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        hf_config.check_activation("hidden_act", self.hidden_act)
        hf_config.check_heads(self.hidden_size, self.num_attention_heads)


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """Both halves."""

    text: BlipTextConfig
    vision: VisionConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlipConfig:
        """Reads the nested config.json of a BLIP model.

        Raises:
            ValueError: another model's config, or an entry that we cannot compute.
        """
        hf_config.check_choice("model_type", values.get("model_type", "blip"), ("blip",))
        return cls(
            text=hf_config.select(BlipTextConfig, hf_config.section(values, "text_config")),
            vision=read_vision_config(
                hf_config.section(values, "vision_config"), "blip_vision_model"
            ),
        )


class BlipTextLayer(nn.Module):
    """Self-attention, attention to the image, MLP; each is added, then normalised."""

    config: BlipTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, image: Array, bias: Array) -> tuple[Array, None]:
        """x [N, L, D], tokens of the image [N, M, E], and a bias [N, 1, 1, L] that masks text."""
        c = self.config
        x = self._attend("attention", x, x, bias)
        x = self._attend("crossattention", x, image, None)
        h = self._linear(c.intermediate_size, "intermediate.dense", ("embed", "mlp"))(x)
        h = activation(c.hidden_act)(constrain(h, "batch", "tokens", "mlp"))
        h = self._linear(c.hidden_size, "output.dense", ("mlp", "embed"))(h)
        x = self._norm("output.LayerNorm")(x + h)
        return constrain(x, "batch", "tokens", "embed"), None

    def _attend(self, name: str, x: Array, to: Array, bias: Array | None) -> Array:
        c, axes = self.config, ("embed", "heads")
        q, k, v = (
            split_heads(
                self._linear(c.hidden_size, f"{name}.self.{part}", axes)(source),
                c.num_attention_heads,
            )
            for part, source in (("query", x), ("key", to), ("value", to))
        )
        h = merge_heads(attention(q, k, v, bias=bias))
        h = self._linear(c.hidden_size, f"{name}.output.dense", ("heads", "embed"))(h)
        return self._norm(f"{name}.output.LayerNorm")(x + h)

    def _linear(self, features: int, name: str, axes: tuple[str, str]) -> Dense:
        return Dense(features, dtype=self.dtype, kernel_axes=axes, name=name)

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, name=name)


class BlipTextEncoder(nn.Module):
    """Everything under `text_encoder.`: texts and their images -> hidden states [N, L, D]."""

    config: BlipTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_ids: Array, mask: Array, image: Array) -> Array:
        c, length = self.config, token_ids.shape[-1]
        if length > c.max_position_embeddings:
            raise ValueError(f"{length} tokens, but BLIP has {c.max_position_embeddings} positions")
        words, positions = (
            Embed(count, c.hidden_size, self.dtype, name=f"embeddings.{name}_embeddings")
            for name, count in (("word", c.vocab_size), ("position", c.max_position_embeddings))
        )
        x = words(token_ids) + positions(jnp.arange(length))
        x = LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="embeddings.LayerNorm")(x)
        x = constrain(x, "batch", "tokens", "embed")
        bias = jnp.where(mask.astype(bool), 0.0, -jnp.inf)[:, None, None, :]
        run = scan_layers(BlipTextLayer, c.num_hidden_layers)
        layers = run(c, self.dtype, name=run_name("encoder.layer", 0, c.num_hidden_layers))
        x, _ = layers(x, image, bias)
        return x


class BlipModel(nn.Module):
    """An image and a text that looks at it."""

    config: BlipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.vision_model = VisionTower(self.config.vision, self.dtype, tokens=True)
        self.text_encoder = BlipTextEncoder(self.config.text, self.dtype)

    def __call__(self, token_ids: Array, mask: Array, pixels: Array) -> Array:
        """The text's first token after it has seen the image.

        Args:
            token_ids: [N, L] int, one text an image.
            mask: [N, L], true or 1 for tokens that are not padding; at least one in each row.
            pixels: [N, H, W, 3], normalised.

        Returns:
            [N, D] in the compute dtype.
        """
        return self.text_encoder(token_ids, mask, self.vision_model(pixels))[:, 0]

    def get_image_features(self, pixels: Array) -> Array:
        """The image's class token [N, E], normalised pixels [N, H, W, 3] in."""
        return self.vision_model(pixels)[:, 0]
