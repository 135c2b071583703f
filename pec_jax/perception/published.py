"""The architectures of published encoders, as their own config files say (huggingface.co).

They serve commands that need only shapes, and models that are published as a file of weights
without a config.
"""

from __future__ import annotations

from typing import Any

from pec_jax.weights.published import Files

SQUARED = {"do_center_crop": False}


def _tower(width: int, layers: int, heads: int, act: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
    }


def _clip(
    text: tuple[int, int],
    vision: tuple[int, int],
    act: str,
    side: int = 224,
    preprocessor: dict[str, Any] | None = None,
) -> Files:
    """CLIP with a ViT of patches of 14; (width, layers) of each tower."""
    return {
        "config.json": {
            "model_type": "clip",
            "projection_dim": text[0],
            "text_config": {
                **_tower(*text, text[0] // 64, act),
                "vocab_size": 49408,
                "max_position_embeddings": 77,
            },
            "vision_config": {**_tower(*vision, 16, act), "image_size": side, "patch_size": 14},
        },
        "preprocessor_config.json": preprocessor or {},  # CLIP's own defaults
    }


def _dinov2(width: int, layers: int, **options: Any) -> Files:
    return {
        "config.json": {
            "model_type": "dinov2_with_registers" if "num_register_tokens" in options else "dinov2",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "image_size": 518,
            "patch_size": 14,
            **options,
        },
        "preprocessor_config.json": {"size": {"shortest_edge": 256}},
    }


def _dinov3(width: int, layers: int, heads: int, **options: Any) -> Files:
    return {
        "config.json": {
            "model_type": "dinov3_vit",
            **_tower(width, layers, heads, "gelu"),
            "num_register_tokens": 4,
            **options,
        },
        "preprocessor_config.json": {},
    }


def _siglip(width: int, layers: int, heads: int, mlp: int, side: int, patch: int) -> Files:
    tower = _tower(width, layers, heads, "gelu_pytorch_tanh")
    return {
        "config.json": {
            "model_type": "siglip",
            "vision_config": {
                **tower,
                "intermediate_size": mlp,
                "image_size": side,
                "patch_size": patch,
            },
        },
        "preprocessor_config.json": {"size": {"height": side, "width": side}},
    }


_H_TEXT, _H_VISION = (1024, 24), (1280, 32)
# Black bars around what is not square, before the mean is subtracted.
_LONGEST = {"size": {"longest_edge": 224}, "do_pad": True, **SQUARED}
_SQUASHED_378 = {"size": {"height": 378, "width": 378}, **SQUARED}
HPSV2 = _clip(_H_TEXT, _H_VISION, "gelu", preprocessor=_LONGEST)
# transformers' own defaults are not those of ImageReward: 8 heads in the text encoder, and 1e-5.
IMAGE_REWARD: Files = {
    "config.json": {
        "model_type": "blip",
        "vision_config": {
            **_tower(1024, 24, 16, "gelu"),
            "image_size": 224,
            "patch_size": 16,
            "layer_norm_eps": 1e-6,
        },
        "text_config": {**_tower(768, 12, 12, "gelu"), "vocab_size": 30524},
    },
    "preprocessor_config.json": {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": 224,
    },
}

# By the last part of a path or hub id, in lower case.
ENCODERS: dict[str, Files] = {
    "pickscore_v1": _clip(_H_TEXT, _H_VISION, "gelu"),
    "clip-vit-h-14-laion2b-s32b-b79k": _clip(_H_TEXT, _H_VISION, "gelu"),
    "clip-vit-large-patch14": _clip((768, 12), (1024, 24), "quick_gelu"),
    "dfn5b-clip-vit-h-14-378": _clip(
        _H_TEXT, _H_VISION, "quick_gelu", side=378, preprocessor=_SQUASHED_378
    ),
    "hps_v2_compressed.pt": HPSV2,
    "hps_v2.1_compressed.pt": HPSV2,
    "hpsv21": HPSV2,
    "imagereward.pt": IMAGE_REWARD,
    "imagereward": IMAGE_REWARD,
    "dino-vitb16": {
        "config.json": {
            "model_type": "vit",
            **_tower(768, 12, 12, "gelu"),
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "layer_norm_eps": 1e-12,
        },
        "preprocessor_config.json": {"size": 224, "resample": 2},
    },
    "dinov2-base": _dinov2(768, 12),
    "dinov2-large": _dinov2(1024, 24),
    "dinov2-with-registers-large": _dinov2(1024, 24, num_register_tokens=4),
    "dinov2-giant": _dinov2(1536, 40, use_swiglu_ffn=True),
    "dinov3-vits16-pretrain-lvd1689m": _dinov3(384, 12, 6),
    "dinov3-vits16plus-pretrain-lvd1689m": _dinov3(
        384, 12, 6, use_gated_mlp=True, hidden_act="silu"
    ),
    "dinov3-vitb16-pretrain-lvd1689m": _dinov3(768, 12, 12),
    "dinov3-vitl16-pretrain-lvd1689m": _dinov3(1024, 24, 16),
    "siglip-so400m-patch14-384": _siglip(1152, 27, 16, 4304, 384, 14),
    "siglip2-base-patch16-224": _siglip(768, 12, 12, 3072, 224, 16),
    "siglip2-so400m-patch14-384": _siglip(1152, 27, 16, 4304, 384, 14),
}
