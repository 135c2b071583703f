"""The ViT against transformers, at the names of published checkpoints."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from pec_jax.families.text import load_variables
from pec_jax.models import vit
from pec_jax.weights.tensors import WeightsError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def save(directory, add_pooling_layer: bool, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**SMALL, **changes})
    model = transformers.ViTModel(config, add_pooling_layer=add_pooling_layer).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape)
    model.save_pretrained(directory)
    return model


def load(directory, side: int):
    config = vit.ViTConfig.from_dict(json.loads((directory / "config.json").read_text()))
    module = vit.ViTModel(config)
    pixels = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)
    return module, pixels


@pytest.mark.parametrize(
    "changes, pooler",
    [
        ({}, False),
        ({"image_size": 28, "patch_size": 7, "num_attention_heads": 4}, True),
        ({"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, False),
    ],
)
def test_equals_transformers(tmp_path, changes, pooler):
    model = save(tmp_path, pooler, **changes)
    module, pixels = load(tmp_path, model.config.image_size)
    variables = load_variables(tmp_path, module, pixels, ignore=vit.IGNORED_TENSORS)
    ours = np.asarray(jax.jit(module.apply)(variables, pixels))
    theirs = model(torch.tensor(pixels).permute(0, 3, 1, 2)).last_hidden_state.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()

    count = sum(a.size for a in jax.tree.leaves(variables["params"]))
    body = {name: p for name, p in model.named_parameters() if not name.startswith("pooler.")}
    assert count == sum(p.numel() for p in body.values())


def test_other_tensors_than_the_pooler_are_not_ignored(tmp_path):
    save(tmp_path, add_pooling_layer=False, num_hidden_layers=4)
    module = vit.ViTModel(vit.ViTConfig.from_dict(SMALL))  # one layer fewer than stored
    pixels = np.zeros((1, 32, 32, 3), np.float32)
    with pytest.raises(WeightsError, match=r"encoder\.layer\.3\."):
        load_variables(tmp_path, module, pixels, ignore=vit.IGNORED_TENSORS)


def test_bf16_stays_near_fp32():
    config = vit.ViTConfig.from_dict(SMALL)
    pixels = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(vit.ViTModel(config).init)(jax.random.key(0), pixels)
    half = jax.jit(vit.ViTModel(config, dtype=jnp.bfloat16).apply)(variables, pixels)
    assert half.dtype == jnp.bfloat16
    full = jax.jit(vit.ViTModel(config).apply)(variables, pixels)
    np.testing.assert_allclose(half.astype(np.float32), full, atol=0.1)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"model_type": "dinov2"}, "model_type = 'dinov2'"),
        ({"head_dim": 8}, "head_dim = 8"),
        ({"image_size": [32, 48]}, r"image_size = \[32, 48\]"),
    ],
)
def test_config_names_what_it_cannot_compute(values, message):
    with pytest.raises(ValueError, match=message):
        vit.ViTConfig.from_dict({**SMALL, **values})


def test_wrong_image_size_is_an_error():
    module = vit.ViTModel(vit.ViTConfig.from_dict(SMALL))
    with pytest.raises(ValueError, match=r"\(24, 24, 3\), but the ViT expects \(32, 32, 3\)"):
        jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 24, 24, 3), np.float32))
