"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206).

Two CLIP towers and a T5 encoder condition an MMDiT:

    tokens = concat_L(pad_D(concat_D(clip, clip_2)), t5),  pooled = concat_D(embeds, embeds_2)

where clip are hidden states before the last layer, padded with zeros to T5's width, and embeds the
projected end-of-text features (figure 2; the details are those of `encode_prompt` of diffusers'
pipeline). No attention mask is used: padding is part of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pec_jax.families.base import Pipeline, timesteps
from pec_jax.families.networks import PUBLISHED_VAE, Network, float_shape
from pec_jax.families.text import clip_encoder, t5_encoder
from pec_jax.io import read_json
from pec_jax.models.mmdit import MMDiT, MMDiTConfig, sincos_position_table
from pec_jax.models.text import Combine
from pec_jax.types import Array, Conditioning, PyTree
from pec_jax.weights import single_files
from pec_jax.weights.published import Files

T5_WIDTH = 4096  # of T5-XXL, where no config says another


def _inputs(config: MMDiTConfig) -> tuple[Any, ...]:
    return (
        float_shape(1, config.patch_size, config.patch_size, config.in_channels),
        float_shape(1),
        float_shape(1, 1, config.joint_attention_dim),
        float_shape(1, config.pooled_projection_dim),
    )


def _buffers(module: MMDiT) -> PyTree:
    """The table of positions, which checkpoints store beside the parameters."""
    c = module.config
    table = sincos_position_table(c.inner_dim, c.pos_embed_max_size, c.sample_size // c.patch_size)
    return {"pos_embed": {"pos_embed": table}}


def join(clip: Array, clip_2: Array, t5: Array) -> Array:
    """Puts the tokens of the three encoders into one sequence.

    Args:
        clip: hidden states of the first CLIP tower [N, L, D1].
        clip_2: hidden states of the second [N, L, D2].
        t5: hidden states of T5 [N, M, D], D >= D1 + D2.

    Returns:
        [N, L + M, D]: the CLIP tokens side by side and filled up with zeros, then those of T5.

    Raises:
        ValueError: the CLIP widths exceed T5's.
    """
    both = jnp.concatenate([clip, clip_2], axis=-1)
    missing = t5.shape[-1] - both.shape[-1]
    if missing < 0:
        raise ValueError(
            f"the CLIP text encoders are {clip.shape[-1]} + {clip_2.shape[-1]} wide, "
            f"more than T5's {t5.shape[-1]}"
        )
    both = jnp.pad(both, ((0, 0), (0, 0), (0, missing)))
    return jnp.concatenate([both, t5.astype(both.dtype)], axis=1)


def combine_with(text_length: int, width: int) -> Combine:
    """The combination of "clip", "clip_2" and, if there is one, "t5".

    Args:
        text_length: M, tokens of zeros that stand in the place of T5's where it is left out.
        width: D of those tokens.
    """

    def combine(outputs: Mapping[str, Any], masks: Mapping[str, Array]) -> Conditioning:
        del masks
        clip, clip_2 = outputs["clip"], outputs["clip_2"]
        t5 = outputs.get("t5")
        if t5 is None:
            t5 = jnp.zeros((clip.pooled.shape[0], text_length, width))
        tokens = join(clip.penultimate, clip_2.penultimate, t5)
        pooled = jnp.concatenate([clip.text_embeds, clip_2.text_embeds], axis=-1)
        return Conditioning(tokens.astype(jnp.float32), pooled.astype(jnp.float32))

    return combine


def _published(transformer: Mapping[str, Any]) -> Files:
    """A pipeline's config files, as far as they decide shapes and schedule (huggingface.co)."""
    return {
        "model_index.json": {
            "_class_name": "StableDiffusion3Pipeline",
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
        },
        "transformer/config.json": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "attention_head_dim": 64,
            "joint_attention_dim": T5_WIDTH,
            "pooled_projection_dim": 2048,
            "qk_norm": "rms_norm",
            **transformer,
        },
        "vae/config.json": {**PUBLISHED_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    }


_MEDIUM = _published(
    {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
    }
)
_LARGE = _published(
    {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
    }
)
_PUBLISHED = {  # by a name of our own, and by that on the hub
    "sd3.5-medium": _MEDIUM,
    "stable-diffusion-3.5-medium": _MEDIUM,
    "sd3.5-large": _LARGE,
    "stable-diffusion-3.5-large": _LARGE,
}
_TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 128,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 128,
    "pos_embed_max_size": 16,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}


class StableDiffusion3(Pipeline):
    """Stable Diffusion 3: an MMDiT with classifier-free guidance."""

    name = "sd3"
    class_name = "StableDiffusion3Pipeline"
    transformer_network = Network(
        "SD3Transformer2DModel",
        MMDiT,
        MMDiTConfig,
        _inputs,
        _buffers,
        original=single_files.SD3,
        origin="stabilityai/stable-diffusion-3.5-medium",
    )
    text_encoders = (
        clip_encoder("text_encoder", "clip", projected=True),
        clip_encoder("text_encoder_2", "clip_2", projected=True),
        t5_encoder("text_encoder_3", "t5", optional=True),
    )
    text_length = 256
    published = _PUBLISHED
    tiny = _TINY

    @property
    def patch_size(self) -> int:
        return self.transformer.config.patch_size

    @property
    def default_size(self) -> int:
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def default_guidance(self) -> float:
        return 4.5

    @property
    def transformer_channels(self) -> tuple[int, int]:
        return self.transformer.config.in_channels, self.transformer.config.out_channels

    def velocity(
        self,
        variables: PyTree,
        x_t: Array,
        sigma: Array,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Array:
        del guidance
        text = conditioning.tokens, conditioning.pooled
        return self.transformer.apply(variables, x_t, timesteps(sigma, x_t), *text)

    @classmethod
    def combiner(cls, root: Path, text_length: int) -> Combine:
        config = read_json(root / "transformer" / "config.json")
        return combine_with(text_length, config.get("joint_attention_dim", T5_WIDTH))

    @classmethod
    def shared_lengths(cls, lengths: Mapping[str, int]) -> dict[str, int]:
        # As in diffusers, the first tokenizer's length holds for both CLIP towers.
        shortest = min(lengths["clip"], lengths["clip_2"])
        return {**lengths, "clip": shortest, "clip_2": shortest}

    def conditioning_shapes(self) -> Conditioning:
        c = self.transformer.config
        length = self.text_lengths["clip"] + self.text_lengths["t5"]
        return Conditioning(
            float_shape(length, c.joint_attention_dim), float_shape(c.pooled_projection_dim)
        )
