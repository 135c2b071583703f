"""DINOv2 against transformers, at the names of published checkpoints."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from pec_jax.families.text import load_variables
from pec_jax.models import dinov2

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 7,
}
REGISTERS = {"num_register_tokens": 3}


def save(directory, changes) -> torch.nn.Module:
    torch.manual_seed(0)
    values = {**SMALL, **changes}
    if "num_register_tokens" in values:
        model = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**values)
        )
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**values))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    model.eval().save_pretrained(directory)
    return model


def load(directory, **options):
    values = json.loads((directory / "config.json").read_text())
    module = dinov2.Dinov2Model(dinov2.Dinov2Config.from_dict(values), **options)
    pixels = np.zeros((1, 42, 42, 3), np.float32)
    return module, load_variables(directory, module, pixels, ignore=dinov2.IGNORED_TENSORS)


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({}, (42, 42)),  # the grid of the positions
        ({}, (28, 28)),  # fewer patches
        ({"qkv_bias": False, "hidden_act": "gelu_new"}, (63, 35)),  # not square
        ({"use_swiglu_ffn": True, "mlp_ratio": 3}, (45, 30)),  # not whole patches
        (REGISTERS, (42, 42)),
        (REGISTERS | {"use_swiglu_ffn": True}, (28, 21)),
        (REGISTERS | {"num_register_tokens": 1}, (70, 84)),  # more patches
    ],
)
def test_equals_transformers(tmp_path, changes, shape):
    model = save(tmp_path, changes)
    module, variables = load(tmp_path)
    pixels = np.random.default_rng(1).normal(size=(2, *shape, 3)).astype(np.float32)
    ours = np.asarray(jax.jit(module.apply)(variables, pixels))
    with torch.no_grad():
        theirs = model(torch.tensor(pixels).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    count = sum(a.size for a in jax.tree.leaves(variables["params"]))
    assert count == sum(p.numel() for p in model.parameters()) - SMALL["hidden_size"]  # mask_token


def test_bf16_is_as_near_as_torchs(tmp_path):
    model = save(tmp_path, {})
    module, variables = load(tmp_path)
    half, half_variables = load(tmp_path, dtype=jnp.bfloat16)
    pixels = np.random.default_rng(1).normal(size=(2, 28, 28, 3)).astype(np.float32)
    exact = np.asarray(jax.jit(module.apply)(variables, pixels))
    ours = np.asarray(jax.jit(half.apply)(half_variables, pixels), np.float32)
    with torch.no_grad():
        images = torch.tensor(pixels).permute(0, 3, 1, 2).bfloat16()
        theirs = model.bfloat16()(images).last_hidden_state.float().numpy()
    assert np.abs(ours - exact).mean() < 2 * np.abs(theirs - exact).mean()


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", [(6, 6), (3, 4), (11, 5), (13, 17)])
def test_positions_equal_torch(smooth, size):
    table = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    ours = dinov2.interpolate_positions(jnp.asarray(table), *size, smooth=smooth)
    grid = torch.tensor(table).reshape(1, 8, 8, 5).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", antialias=smooth)
    theirs = theirs.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"model_type": "vit"}, "model_type = 'vit'"),
        ({"num_attention_heads": 5}, "num_attention_heads = 5"),
        ({"image_size": [32, 48]}, r"image_size = \[32, 48\]"),
    ],
)
def test_config_names_what_it_cannot_compute(values, message):
    with pytest.raises(ValueError, match=message):
        dinov2.Dinov2Config.from_dict({**SMALL, **values})


def test_images_smaller_than_a_patch_are_an_error():
    module = dinov2.Dinov2Model(dinov2.Dinov2Config.from_dict(SMALL))
    with pytest.raises(ValueError, match="at least 7 pixels a side"):
        jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 6, 42, 3), np.float32))
