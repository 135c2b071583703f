"""Vision transformers against transformers, at the names of published checkpoints."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from pec_jax.models.vision import VisionTower, axial_rotation, interpolate_positions
from pec_jax.models.vision_kinds import KINDS, read_vision_config
from pec_jax.weights.convert import abstract_variables, count_parameters, from_torch
from pec_jax.weights.layouts import LAYOUTS
from pec_jax.weights.model_files import open_model
from pec_jax.weights.tensors import WeightsError
from tests.models import oracles

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
REGISTERS = {"num_register_tokens": 3}
NETWORKS = {
    "clip_vision_model": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    "vit": (transformers.ViTConfig, transformers.ViTModel),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersModel,
    ),
    "dinov3_vit": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel),
    "siglip_vision_model": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
    "blip_vision_model": (transformers.BlipVisionConfig, transformers.BlipVisionModel),
}
UNUSED = re.compile(r"mask_token|^pooler\.")
# (kind, changes of the config, (height, width) of the images)
CASES = [
    ("clip_vision_model", {}, (32, 32)),
    ("clip_vision_model", {"hidden_act": "gelu", "image_size": 34}, (34, 34)),  # a rest is cut off
    ("clip_vision_model", {"num_attention_heads": 4, "layer_norm_eps": 1e-3}, (40, 24)),
    ("clip_vision_model", {"patch_size": 5, "num_hidden_layers": 1}, (33, 47)),
    ("vit", {}, (32, 32)),
    ("vit", {"image_size": 28, "patch_size": 7, "num_attention_heads": 4}, (28, 28)),
    ("vit", {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, (32, 32)),
    ("vit", {"hidden_size": 36, "num_attention_heads": 3}, (48, 16)),
    ("dinov2", {}, (32, 32)),  # the grid of the positions
    ("dinov2", {}, (24, 24)),  # fewer patches
    ("dinov2", {"qkv_bias": False, "hidden_act": "gelu_new"}, (63, 35)),
    ("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 3}, (45, 30)),  # not whole patches
    ("dinov2_with_registers", REGISTERS, (32, 32)),
    ("dinov2_with_registers", REGISTERS | {"use_swiglu_ffn": True}, (24, 18)),
    ("dinov2_with_registers", {"num_register_tokens": 1}, (70, 84)),  # more patches
    ("dinov2_with_registers", {"patch_size": 5}, (41, 28)),
    ("dinov3_vit", REGISTERS, (32, 32)),
    ("dinov3_vit", REGISTERS | {"use_gated_mlp": True, "hidden_act": "silu"}, (24, 48)),
    ("dinov3_vit", REGISTERS | {"query_bias": False, "value_bias": False}, (50, 27)),
    ("dinov3_vit", {"num_register_tokens": 1, "mlp_bias": False, "rope_theta": 30.0}, (8, 40)),
    ("dinov3_vit", REGISTERS | {"proj_bias": False, "num_attention_heads": 4}, (34, 34)),
    ("siglip_vision_model", {}, (32, 32)),
    ("siglip_vision_model", {"image_size": 40, "patch_size": 14}, (40, 40)),  # 2 x 2 patches
    ("siglip_vision_model", {"hidden_act": "gelu", "num_attention_heads": 4}, (40, 24)),
    ("siglip_vision_model", {"layer_norm_eps": 1e-3, "patch_size": 5}, (33, 47)),
    ("blip_vision_model", {}, (32, 32)),
    ("blip_vision_model", {"layer_norm_eps": 1e-6, "num_attention_heads": 4}, (40, 24)),
    ("blip_vision_model", {"image_size": 28, "patch_size": 7}, (28, 28)),
    ("blip_vision_model", {"hidden_act": "quick_gelu", "patch_size": 5}, (33, 47)),
]


def make(kind: str, changes: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config, network = NETWORKS[kind]
    return oracles.randomise(network(config(**{**SMALL, **changes})))


def load(directory, values: dict, dtype=jnp.float32, **options):
    kind = values["model_type"]
    module = VisionTower(read_vision_config(values), dtype=dtype, **options)
    side = module.config.image_size
    boxes = abstract_variables(module, np.zeros((1, side, side, 3), np.float32))
    tensors = open_model(directory)
    if kind in LAYOUTS:
        tensors = LAYOUTS[kind](tensors)
    elif kind in ("clip_vision_model", "blip_vision_model"):  # saved by themselves only here
        tensors = {name.removeprefix("vision_model."): a for name, a in tensors.items()}
    ignored = KINDS[kind].ignored
    if options.get("tokens"):
        ignored += (r"head\..*",)  # SigLIP's pooling, which tokens do not go through
    return module, from_torch(tensors, boxes, ignore=ignored, dtype=dtype)


def run_torch(model: torch.nn.Module, images: np.ndarray, square: bool) -> torch.nn.Module:
    takes = model.config.model_type not in ("dinov2", "dinov2_with_registers", "dinov3_vit")
    options = {"interpolate_pos_encoding": True} if takes and not square else {}
    with torch.no_grad():
        return model(oracles.to_torch(images), **options)


@pytest.mark.parametrize("kind, changes, size", CASES)
def test_features_equal_transformers(tmp_path, kind, changes, size):
    model = make(kind, changes)
    values = oracles.save(model, tmp_path)
    images = oracles.pixels(2, *size, 3)
    square = size == (values["image_size"],) * 2
    theirs = run_torch(model, images, square)

    module, variables = load(tmp_path, values, tokens=True)
    hidden = jax.jit(module.apply)(variables, images)
    last = theirs.last_hidden_state
    if kind == "clip_vision_model":  # whose post_layernorm is applied to the class token alone
        last = getattr(model, "vision_model", model).post_layernorm(last)
    assert oracles.relative_error(hidden, last.detach()) < 1e-5

    module, variables = load(tmp_path, values)
    features = jax.jit(module.apply)(variables, images)
    if module.config.pooling == "attention":
        assert oracles.relative_error(features, theirs.pooler_output) < 1e-5
    else:
        assert oracles.relative_error(features, last.detach()[:, 0]) < 1e-5
    used = [p for name, p in model.named_parameters() if not UNUSED.search(name)]
    assert count_parameters(variables) == sum(p.numel() for p in used)


# CLIP's tokens are not normalised there; the whole model is in test_clip.
@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind != "clip_vision_model"])
def test_bf16_is_as_near_as_torchs(tmp_path, kind):
    model = make(kind, REGISTERS if kind == "dinov3_vit" else {})
    values = oracles.save(model, tmp_path)
    images = oracles.pixels(2, 32, 32, 3)
    exact = run_torch(model, images, True).last_hidden_state.numpy()
    module, variables = load(tmp_path, values, jnp.bfloat16, tokens=True)
    ours = np.asarray(jax.jit(module.apply)(variables, images), np.float32)
    with torch.no_grad():
        theirs = model.bfloat16()(oracles.to_torch(images).bfloat16()).last_hidden_state
    assert np.abs(ours - exact).mean() < 2 * np.abs(theirs.float().numpy() - exact).mean()


def test_a_siglip_of_two_towers_gives_its_vision_tower(tmp_path):
    shared = {k: v for k, v in SMALL.items() if k not in ("image_size", "patch_size")}
    config = transformers.SiglipConfig(
        vision_config=SMALL, text_config=shared | {"vocab_size": 20, "max_position_embeddings": 4}
    )
    torch.manual_seed(0)
    model = oracles.randomise(transformers.SiglipModel(config))
    oracles.save(model, tmp_path)
    values = {**SMALL, "model_type": "siglip_vision_model"}
    module, variables = load(tmp_path, values)
    images = oracles.pixels(2, 32, 32, 3)
    with torch.no_grad():
        theirs = model.vision_model(oracles.to_torch(images)).pooler_output
    assert oracles.relative_error(jax.jit(module.apply)(variables, images), theirs) < 1e-5


def test_a_layer_too_many_is_not_ignored(tmp_path):
    model = make("vit", {"num_hidden_layers": 4})
    values = oracles.save(model, tmp_path)
    with pytest.raises(WeightsError, match=r"encoder\.layer\.3\."):
        load(tmp_path, values | {"num_hidden_layers": 3})


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", [(6, 6), (3, 4), (11, 5), (13, 17)])
def test_positions_equal_torch(smooth, size):
    table = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    ours = interpolate_positions(jnp.asarray(table), *size, smooth=smooth)
    grid = torch.tensor(table).reshape(1, 8, 8, 5).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", antialias=smooth)
    theirs = theirs.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_rotation_keeps_lengths_and_depends_on_differences():
    rotation = axial_rotation(3, 5, 8, 100.0)
    x, y = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    x, y = (jnp.broadcast_to(a, (1, 15, 1, 8)) for a in (x, y))
    turned = rotation(x)
    np.testing.assert_allclose(jnp.square(turned).sum(-1), jnp.square(x).sum(-1), rtol=1e-5)
    logits = jnp.einsum("nqhd,nkhd->qk", rotation(x), rotation(y))
    # One row down from anywhere is the same angle.
    np.testing.assert_allclose(logits[0, 5], logits[7, 12], rtol=1e-4)
    prefixed = rotation(jnp.concatenate([x[:, :2], x], axis=1))
    np.testing.assert_array_equal(prefixed[:, :2], x[:, :2])
    np.testing.assert_array_equal(prefixed[:, 2:], turned)


@pytest.mark.parametrize(
    "kind, values, message",
    [
        ("vit", {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ("vit", {"head_dim": 8}, "head_dim = 8"),
        ("vit", {"image_size": [32, 48]}, r"image_size = \[32, 48\]"),
        ("dinov2", {"num_attention_heads": 5}, "num_attention_heads = 5"),
        ("swin", {}, "model_type = 'swin'"),
        ("siglip_vision_model", {"vision_use_head": False}, "vision_use_head = False"),
        ("dinov3_vit", {"hidden_size": 36, "num_attention_heads": 6}, "heads of 6"),
    ],
)
def test_config_names_what_it_cannot_compute(kind, values, message):
    with pytest.raises(ValueError, match=message):
        read_vision_config({**SMALL, "model_type": kind, **values})


def test_images_smaller_than_a_patch_are_an_error():
    module = VisionTower(read_vision_config({**SMALL, "model_type": "dinov2"}))
    with pytest.raises(ValueError, match="at least 8 pixels a side"):
        jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 6, 42, 3), np.float32))
