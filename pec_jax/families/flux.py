"""FLUX.1 (Black Forest Labs 2024): guidance distilled into the model, a schedule by image size.

A T5 encoder and one CLIP tower, of which the end-of-text feature alone is taken, condition it:

    tokens = t5,  pooled = end_of_text(clip)

The details are those of `encode_prompt` of diffusers' pipeline; no attention mask is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pec_jax.families.base import Pipeline, timesteps
from pec_jax.families.networks import PUBLISHED_VAE, Network, float_shape
from pec_jax.families.text import clip_encoder, t5_encoder
from pec_jax.io import read_json, write_json
from pec_jax.models.flux import PACK, Flux, FluxConfig
from pec_jax.models.text import Combine
from pec_jax.types import Array, Conditioning, PyTree
from pec_jax.weights import single_files
from pec_jax.weights.published import Files
from pec_jax.weights.tensors import read_tensors, write_tensors

SAMPLE_SIZE = 128  # latent pixels; in diffusers a constant of the pipeline
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
_INDEX = {
    "_class_name": "FluxPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
}


def _inputs(config: FluxConfig) -> tuple[Any, ...]:
    return (
        float_shape(1, PACK, PACK, config.latent_channels),
        float_shape(1),
        float_shape(1, 1, config.joint_attention_dim),
        float_shape(1, config.pooled_projection_dim),
        *((float_shape(1),) if config.guidance_embeds else ()),
    )


def combine(outputs: Mapping[str, Any], masks: Mapping[str, Array]) -> Conditioning:
    """The combination of "clip" and "t5"; fp32 whatever the towers compute in."""
    del masks
    return Conditioning(
        outputs["t5"].astype(jnp.float32), outputs["clip"].pooled.astype(jnp.float32)
    )


_PUBLISHED: dict[str, Files] = {
    "flux.1-dev": {
        "model_index.json": _INDEX,
        "transformer/config.json": {
            "_class_name": "FluxTransformer2DModel",
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        "vae/config.json": {**PUBLISHED_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "scheduler/scheduler_config.json": _SCHEDULER,
    }
}
_TINY = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}


class Flux1(Pipeline):
    """FLUX.1: dev takes the guidance scale as an input; schnell has none."""

    name = "flux"
    class_name = "FluxPipeline"
    transformer_network = Network(
        "FluxTransformer2DModel",
        Flux,
        FluxConfig,
        _inputs,
        original=single_files.FLUX,
        origin="black-forest-labs/FLUX.1-dev",
    )
    text_encoders = (
        clip_encoder("text_encoder", "clip", projected=False),
        t5_encoder("text_encoder_2", "t5"),
    )
    text_length = 512
    evenly_spaced = True
    published = _PUBLISHED
    tiny = _TINY

    @property
    def patch_size(self) -> int:
        return PACK

    @property
    def default_size(self) -> int:
        return SAMPLE_SIZE * self.vae_scale_factor

    @property
    def default_guidance(self) -> float:
        return 3.5 if self.embeds_guidance else 1.0

    @property
    def embeds_guidance(self) -> bool:
        return self.transformer.config.guidance_embeds

    @property
    def transformer_channels(self) -> tuple[int, int]:
        c = self.transformer.config
        return c.latent_channels, c.out_channels // PACK**2

    def velocity(
        self,
        variables: PyTree,
        x_t: Array,
        sigma: Array,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Array:
        text = conditioning.tokens, conditioning.pooled
        extra = () if guidance is None else (timesteps(guidance, x_t),)
        return self.transformer.apply(variables, x_t, timesteps(sigma, x_t), *text, *extra)

    @classmethod
    def combiner(cls, root: Path, text_length: int) -> Combine:
        return combine

    def conditioning_shapes(self) -> Conditioning:
        c = self.transformer.config
        return Conditioning(
            float_shape(self.text_lengths["t5"], c.joint_attention_dim),
            float_shape(c.pooled_projection_dim),
        )

    @classmethod
    def make_tiny_parts(cls, root: Path) -> None:
        """One CLIP tower without its projection, T5 as the second encoder, FLUX's schedule."""
        for name in ("text_encoder_2", "tokenizer_2"):
            shutil.rmtree(root / name)
            (root / name.replace("2", "3")).rename(root / name)
        clip = root / "text_encoder"
        tensors = dict(read_tensors(clip, "model"))
        del tensors["text_projection.weight"]
        write_tensors(clip, tensors, "model")
        config = read_json(clip / "config.json") | {"architectures": ["CLIPTextModel"]}
        write_json(clip / "config.json", config)
        write_json(root / "scheduler" / "scheduler_config.json", _SCHEDULER)
        index = read_json(root / "model_index.json")
        index["tokenizer_2"] = index.pop("tokenizer_3")
        del index["text_encoder_3"]
        write_json(root / "model_index.json", index | _INDEX)
