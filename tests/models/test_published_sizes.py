"""The encoders at their published widths and image sizes, against transformers.

Whole models are compared by their number of parameters, which takes no memory; two layers of
each by what they compute.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from pec_jax.families.text import load_variables
from pec_jax.models import clip
from pec_jax.models.vision import VisionTower
from pec_jax.models.vision_kinds import KINDS, read_vision_config


def clip_config(text_layers: int, vision_layers: int, **sizes) -> transformers.CLIPConfig:
    text = {
        "hidden_size": sizes["text"],
        "intermediate_size": 4 * sizes["text"],
        "num_attention_heads": sizes["text"] // 64,
        "num_hidden_layers": text_layers,
        "hidden_act": sizes["act"],
    }
    vision = {
        "hidden_size": sizes["vision"],
        "intermediate_size": 4 * sizes["vision"],
        "num_attention_heads": 16,
        "num_hidden_layers": vision_layers,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": sizes["act"],
    }
    return transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=sizes["text"]
    )


def make_clip(layers: int | None, **sizes) -> torch.nn.Module:
    depths = (sizes["text_depth"], sizes["vision_depth"]) if layers is None else (layers, layers)
    return transformers.CLIPModel(clip_config(*depths, **sizes))


def make_vit(layers: int | None) -> torch.nn.Module:
    config = transformers.ViTConfig(num_hidden_layers=layers or 12)
    return transformers.ViTModel(config, add_pooling_layer=False)


def make_dinov2(layers: int | None, width: int, depth: int, **options) -> torch.nn.Module:
    network, config = transformers.Dinov2Model, transformers.Dinov2Config
    if "num_register_tokens" in options:
        network = transformers.Dinov2WithRegistersModel
        config = transformers.Dinov2WithRegistersConfig
    return network(
        config(
            hidden_size=width,
            num_hidden_layers=layers or depth,
            num_attention_heads=width // 64,
            image_size=518,
            patch_size=14,
            **options,
        )
    )


CLIP_L = {"text": 768, "vision": 1024, "text_depth": 12, "vision_depth": 24, "act": "quick_gelu"}
CLIP_H = {"text": 1024, "vision": 1280, "text_depth": 24, "vision_depth": 32, "act": "gelu"}
PUBLISHED = {
    "clip-vit-large-patch14": lambda layers: make_clip(layers, **CLIP_L),
    "PickScore_v1": lambda layers: make_clip(layers, **CLIP_H),
    "dino-vitb16": make_vit,
    "dinov2-base": lambda layers: make_dinov2(layers, 768, 12),
    "dinov2-with-registers-large": lambda layers: make_dinov2(
        layers, 1024, 24, num_register_tokens=4
    ),
    "dinov2-giant": lambda layers: make_dinov2(layers, 1536, 40, use_swiglu_ffn=True),
}


def our_network(values: dict):
    """(module, patterns of tensors to ignore, the method that gives image features or None)."""
    if values["model_type"] == "clip":
        module = clip.CLIPModel(clip.CLIPConfig.from_dict(values))
        return module, clip.IGNORED_TENSORS, "get_image_features"
    kind = values["model_type"]
    return VisionTower(read_vision_config(values), tokens=True), KINDS[kind].ignored, None


def example_inputs(module) -> tuple[np.ndarray, ...]:
    pixels = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    if isinstance(module, clip.CLIPModel):
        return np.array([[0, 320, 49407]], np.int32), pixels
    return (pixels,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    with torch.device("meta"):
        theirs = PUBLISHED[name](None)
    module, _, _ = our_network(json.loads(theirs.config.to_json_string(use_diff=False)))
    abstract = jax.eval_shape(module.init, jax.random.key(0), *example_inputs(module))
    expected = sum(p.numel() for n, p in theirs.named_parameters() if not n.endswith("mask_token"))
    assert sum(a.size for a in jax.tree.leaves(abstract)) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_layers_equal_transformers(tmp_path, name):
    torch.manual_seed(0)
    theirs = PUBLISHED[name](2).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    module, ignored, method = our_network(json.loads((tmp_path / "config.json").read_text()))
    arrays = example_inputs(module)
    variables = load_variables(tmp_path, module, *arrays, ignore=ignored)
    pixels = torch.tensor(arrays[-1]).permute(0, 3, 1, 2)
    with torch.no_grad():
        if method:
            expected = theirs.get_image_features(pixels).pooler_output.numpy()
            text = theirs.get_text_features(torch.tensor(arrays[0]).long()).pooler_output.numpy()
            found = jax.jit(lambda v, ids: module.apply(v, ids, method="get_text_features"))
            assert np.abs(found(variables, arrays[0]) - text).max() < 1e-5 * np.abs(text).max()
        else:
            expected = theirs(pixels).last_hidden_state.numpy()
    found = jax.jit(lambda v, x: module.apply(v, x, method=method))(variables, arrays[-1])
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
