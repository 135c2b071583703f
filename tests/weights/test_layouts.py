"""open_clip's names, transformers' names and prefixed ones of the same weights."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from pec_jax.models import clip
from pec_jax.perception.open_clip import from_open_clip
from pec_jax.weights import layouts
from pec_jax.weights.convert import abstract_variables, from_torch
from pec_jax.weights.model_files import open_model
from pec_jax.weights.tensors import write_tensors
from tests.models import oracles

OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 28,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 7,
        },
        "text_cfg": {
            "context_length": 9,
            "vocab_size": 30,
            "width": 24,
            "heads": 2,
            "layers": 3,
        },
    },
    "preprocess_cfg": {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def make_clip() -> torch.nn.Module:
    torch.manual_seed(0)
    config, _ = from_open_clip(OPEN_CLIP)
    values = {k: dict(config[k]) for k in ("text_config", "vision_config")}
    values["text_config"]["eos_token_id"] = 2
    return oracles.randomise(
        transformers.CLIPModel(transformers.CLIPConfig(**values, projection_dim=20))
    )


def to_open_clip(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' tensors as open_clip stores them, written from open_clip's module tree."""
    result = {
        "logit_scale": state["logit_scale"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        result[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        result[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        result[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for tower, prefix, depth in (("text_model", "", 3), ("vision_model", "visual.", 2)):
            for i in range(depth):
                theirs = f"{tower}.encoder.layers.{i}"
                ours = f"{prefix}transformer.resblocks.{i}"
                parts = [state[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                result[f"{ours}.attn.in_proj_{kind}"] = np.concatenate(parts)
                for a, b in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    result[f"{ours}.{a}.{kind}"] = state[f"{theirs}.{b}.{kind}"]
    return {name: np.array(value, order="C") for name, value in result.items()}


def variables_of(directory, values) -> dict:
    module = clip.CLIPModel(clip.CLIPConfig.from_dict(values))
    boxes = abstract_variables(module, np.zeros((1, 2), np.int32), np.zeros((1, 28, 28, 3)))
    return from_torch(layouts.clip(open_model(directory)), boxes, ignore=clip.IGNORED_TENSORS)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
@pytest.mark.parametrize("naming", ["transformers", "open_clip"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_all_names_of_a_clip_hold_the_same_network(tmp_path, prefix, naming, suffix):
    model = make_clip()
    values = oracles.save(model, tmp_path / "theirs")
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}
    if naming == "open_clip":
        state = to_open_clip(state)
    state = {prefix + name: value for name, value in state.items()}
    if suffix == "pt":
        (tmp_path / "ours").mkdir()
        tensors = {name: torch.tensor(value) for name, value in state.items()}
        torch.save({"epoch": 1, "state_dict": tensors}, tmp_path / "ours" / "HPS.pt")
    else:
        write_tensors(tmp_path / "ours", state)
    expected, found = (variables_of(tmp_path / name, values) for name in ("theirs", "ours"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_shapes_are_known_before_anything_is_read(tmp_path):
    model = make_clip()
    state = to_open_clip({name: p.detach().numpy() for name, p in model.named_parameters()})
    write_tensors(tmp_path, state)
    tensors = layouts.clip(open_model(tmp_path))
    for name in tensors:
        assert tensors.shape(name) == tensors[name].shape
        assert tensors.file(name) == tmp_path / "model.safetensors"


def test_open_clips_config_is_that_of_its_network(tmp_path):
    model = make_clip()
    values = oracles.save(model, tmp_path)
    config, preprocess = from_open_clip(json.loads(json.dumps(OPEN_CLIP)))
    assert clip.CLIPConfig.from_dict(config).vision == clip.CLIPConfig.from_dict(values).vision
    assert preprocess["size"] == {"height": 28, "width": 28} and not preprocess["do_center_crop"]
    assert preprocess["image_mean"] == (0.1, 0.2, 0.3)
