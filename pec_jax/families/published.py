"""The architectures of published models, for commands that need their shapes but no weights.

Each entry is what the model's own config files say (huggingface.co, read in 2026), as far as it
decides shapes and schedule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def _sd3_pipeline(transformer: Mapping[str, Any]) -> dict[str, Any]:
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
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            **transformer,
        },
        "vae/config.json": {**_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    }


def _clip(text: tuple[int, int], vision: tuple[int, int], act: str) -> dict[str, Any]:
    """CLIP with a ViT of patches of 14 at 224 px; (width, layers) of each tower."""

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": act,
        }

    return {
        "config.json": {
            "model_type": "clip",
            "projection_dim": text[0],
            "text_config": {
                **tower(*text, text[0] // 64),
                "vocab_size": 49408,
                "max_position_embeddings": 77,
            },
            "vision_config": {**tower(*vision, 16), "image_size": 224, "patch_size": 14},
        },
        "preprocessor_config.json": {},  # CLIP's own defaults
    }


MODELS: dict[str, dict[str, Any]] = {
    "sd3.5-medium": _sd3_pipeline(
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        }
    ),
    "sd3.5-large": _sd3_pipeline(
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        }
    ),
    "flux.1-dev": {
        "model_index.json": {
            "_class_name": "FluxPipeline",
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
        },
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
        "vae/config.json": {**_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    },
    "pickscore_v1": _clip((1024, 24), (1280, 32), "gelu"),
    "clip-vit-large-patch14": _clip((768, 12), (1024, 24), "quick_gelu"),
    "dino-vitb16": {
        "config.json": {
            "model_type": "vit",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
        },
        "preprocessor_config.json": {"size": 224, "resample": 2},
    },
}


def find(name: str) -> str | None:
    """The entry that the last part of a path or hub id names, whatever its case; or None."""
    last = Path(name.partition("@")[0]).name.lower()
    return next((key for key in MODELS if last in (key, f"stable-diffusion-{key[2:]}")), None)


def write(name: str, directory: Path) -> Path:
    """Writes the config files of an entry of `MODELS`, without weights.

    Returns:
        The directory.
    """
    for file, content in MODELS[name].items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return directory
