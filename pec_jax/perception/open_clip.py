"""open_clip's model files, in the terms of transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pec_jax.models import hf_config

HEAD_WIDTH = 64  # of its vision transformers, where a file leaves it out
RESAMPLE = {"bilinear": 2, "bicubic": 3}


def from_open_clip(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json of a CLIP in an `open_clip_config.json`.

    Args:
        values: {"model_cfg": ..., "preprocess_cfg": ...}.

    Raises:
        ValueError: a model that is not CLIP with vision and text transformers of its first kind.

    Source: mlfoundations/open_clip@89fb801: src/open_clip/{model,transform}.py.
    """
    try:
        model, preprocess = values["model_cfg"], values["preprocess_cfg"]
        text, vision, embed = model["text_cfg"], model["vision_cfg"], model["embed_dim"]
        head_width = vision.get("head_width", HEAD_WIDTH)
        mlp_ratio = vision.get("mlp_ratio", 4.0)
        for tower in (text, vision):
            hf_config.check_value("width", tower["width"], "int")
        hf_config.check_value("head_width", head_width, "int")
        hf_config.check_value("mlp_ratio", mlp_ratio, "float")
        act = "quick_gelu" if model.get("quick_gelu") else "gelu"
        config = {
            "model_type": "clip",
            "projection_dim": embed,
            "text_config": {
                "hidden_size": text["width"],
                "intermediate_size": 4 * text["width"],
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": text.get("context_length", 77),
                "vocab_size": text.get("vocab_size", 49408),
                "hidden_act": act,
            },
            "vision_config": {
                "hidden_size": vision["width"],
                "intermediate_size": int(vision["width"] * mlp_ratio),
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["width"] // head_width,
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "hidden_act": act,
            },
        }
        return config, _preprocessor(preprocess, vision["image_size"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the config of a CLIP with two transformers ({error!r})") from error


def _preprocessor(values: Mapping[str, Any], size: int) -> dict[str, Any]:
    mode = values.get("resize_mode", "shortest")
    how: dict[str, dict[str, Any]] = {
        "shortest": {"size": {"shortest_edge": size}, "crop_size": size, "do_center_crop": True},
        "squash": {"size": {"height": size, "width": size}, "do_center_crop": False},
        "longest": {"size": {"longest_edge": size}, "do_center_crop": False, "do_pad": True},
    }
    hf_config.check_choice("resize_mode", mode, list(how))
    interpolation = values.get("interpolation", "bicubic")
    hf_config.check_choice("interpolation", interpolation, list(RESAMPLE))
    result = {**how[mode], "resample": RESAMPLE[interpolation]}
    return result | {f"image_{key}": tuple(values[key]) for key in ("mean", "std") if key in values}
