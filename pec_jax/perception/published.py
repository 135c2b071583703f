"""The architectures of published encoders, as their own config files say (huggingface.co)."""

from __future__ import annotations

from typing import Any

from pec_jax.weights.published import Files


def _clip(text: tuple[int, int], vision: tuple[int, int], act: str) -> Files:
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


ENCODERS: dict[str, Files] = {
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
