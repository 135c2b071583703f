"""CLIP: its text tower, alone or together with a vision transformer.

The same networks as `CLIPTextModelWithProjection` and `CLIPModel` of transformers, down to the
names of their tensors (`pre_layrnorm` included). Text attention is causal, so padding behind the
end-of-text token never reaches the pooled output.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as init

from pec_jax.distributed.mesh import constrain
from pec_jax.models import hf_config
from pec_jax.models.encoder import LayerConfig, run_layers
from pec_jax.models.layers import Dense, Embed, LayerNorm
from pec_jax.models.vision import VisionConfig, VisionTower
from pec_jax.models.vision_kinds import CLIP_LAYER, read_vision_config

Array = jax.Array

# Buffers that older versions of transformers saved along; they hold 0, 1, 2, ...
IGNORED_TENSORS = (r"(text|vision)_model\.embeddings\.position_ids",)

# transformers wrote this end-of-text id into many configs by mistake; models that carry it are
# pooled at the highest token id instead, which is the end-of-text token of the real vocabulary.
LEGACY_EOS_TOKEN_ID = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The text tower's part of a config.json; defaults are those of transformers."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        hf_config.check_activation("hidden_act", self.hidden_act)
        hf_config.check_heads(self.hidden_size, self.num_attention_heads)

    @property
    def layer(self) -> LayerConfig:
        """Of all layers."""
        return LayerConfig(
            width=self.hidden_size,
            heads=self.num_attention_heads,
            mlp_width=self.intermediate_size,
            activation=self.hidden_act,
            epsilon=self.layer_norm_eps,
            names=CLIP_LAYER,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """Reads a text model's config.json, or the text part of a whole CLIP model's."""
        kind = values.get("model_type", "clip_text_model")
        hf_config.check_choice("model_type", kind, ("clip", "clip_text_model"))
        if "text_config" in values:
            return CLIPConfig.from_dict(values).text
        return hf_config.select(cls, values)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the space in which they meet."""

    text: CLIPTextConfig
    vision: VisionConfig
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """Reads the nested config.json of a `CLIPModel`.

        Old files hold some entries in `text_config_dict` and `vision_config_dict`, which win.

        Raises:
            ValueError: another model's config, or an entry that we cannot compute.
        """
        hf_config.check_choice("model_type", values.get("model_type", "clip"), ("clip",))
        hf_config.check_fields(cls, values)
        text, vision = (
            {**hf_config.section(values, f"{name}_config")}
            | {**hf_config.section(values, f"{name}_config_dict")}
            for name in ("text", "vision")
        )
        dim = values.get("projection_dim") or cls.projection_dim
        return hf_config.select(
            cls,
            values,
            text=hf_config.select(CLIPTextConfig, text, projection_dim=dim),
            vision=read_vision_config(vision, "clip_vision_model"),
        )


class CLIPTextOutput(NamedTuple):
    """What the text tower gives; L tokens, D its width, d the shared space."""

    penultimate: Array  # [N, L, D] transformers' hidden_states[-2], not normalised
    last_hidden: Array  # [N, L, D] after the final layer norm
    pooled: Array  # [N, D] last_hidden at the end-of-text token
    text_embeds: Array | None  # [N, d] pooled, projected; None without projection


class CLIPTextEmbeddings(nn.Module):
    """Token plus position embeddings."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_ids: Array) -> Array:
        c, length = self.config, token_ids.shape[-1]
        if length > c.max_position_embeddings:
            raise ValueError(f"{length} tokens, but CLIP has {c.max_position_embeddings} positions")
        table = Embed(c.vocab_size, c.hidden_size, self.dtype, name="token_embedding")
        positions = Embed(
            c.max_position_embeddings, c.hidden_size, self.dtype, name="position_embedding"
        )
        return table(token_ids) + positions(jnp.arange(length))


class CLIPTextTower(nn.Module):
    """Everything under `text_model.`; its output's text_embeds is None."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_ids: Array) -> CLIPTextOutput:
        c = self.config
        x = CLIPTextEmbeddings(c, self.dtype, name="embeddings")(token_ids)
        x = constrain(x, "batch", "tokens", "embed")
        length = token_ids.shape[-1]
        causal = jnp.where(jnp.tri(length, dtype=bool), 0.0, -jnp.inf)  # [L, L]
        layer, depth = c.layer, c.num_hidden_layers
        penultimate, x = run_layers(layer, depth, "encoder.layers", x, bias=causal)
        last = LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x)
        ids = token_ids if c.eos_token_id == LEGACY_EOS_TOKEN_ID else token_ids == c.eos_token_id
        end = jnp.argmax(ids, axis=-1)  # [N] the first of equals
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(penultimate, last, pooled, None)


def _projection(features: int, dtype: jnp.dtype, name: str | None = None) -> Dense:
    return Dense(
        features, use_bias=False, dtype=dtype, kernel_axes=("embed", "projection"), name=name
    )


class CLIPTextModel(nn.Module):
    """Token ids [N, L] -> CLIPTextOutput; transformers' CLIPTextModelWithProjection.

    `with_projection=False` gives the plain CLIPTextModel, which has no `text_projection`.
    """

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32
    with_projection: bool = True

    @nn.compact
    def __call__(self, token_ids: Array) -> CLIPTextOutput:
        c = self.config
        out = CLIPTextTower(c, self.dtype, name="text_model")(token_ids)
        if not self.with_projection:
            return out
        embeds = _projection(c.projection_dim, self.dtype, "text_projection")(out.pooled)
        return out._replace(text_embeds=embeds)


class CLIPModel(nn.Module):
    """Both towers with their projections into one space, and the logarithm of the logits' scale."""

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.text_model = CLIPTextTower(c.text, self.dtype)
        self.vision_model = VisionTower(c.vision, self.dtype)
        self.text_projection = _projection(c.projection_dim, self.dtype)
        self.visual_projection = _projection(c.projection_dim, self.dtype)
        self.logit_scale = self.param("logit_scale", init.constant(c.logit_scale_init_value), ())

    def __call__(self, token_ids: Array, pixels: Array) -> tuple[Array, Array]:
        """(text features [N, d], image features [M, d]), not normalised."""
        return self.get_text_features(token_ids), self.get_image_features(pixels)

    def get_text_features(self, token_ids: Array) -> Array:
        """Token ids [N, L] -> [N, d], not normalised."""
        return self.text_projection(self.text_model(token_ids).pooled)

    def get_image_features(self, pixels: Array) -> Array:
        """Normalised pixels [N, H, W, 3] -> [N, d], not normalised."""
        return self.visual_projection(self.vision_model(pixels))
