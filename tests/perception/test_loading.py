"""Encoders, loaded from the files of their publishers, against transformers."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pec_jax.errors import FileError
from pec_jax.perception.encoder import unit
from pec_jax.perception.loading import load_encoder
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.weights.tensors import WeightsError
from tests.weights.test_layouts import OPEN_CLIP

CAPTIONS = ["a small red cat in the snow", "a thing", ""]


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.03 * torch.randn(p.shape)
    return model.eval()


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders") / "tiny-clip"
    tokenizers.write_clip_tokenizer(root, CAPTIONS, tokenizers.END)
    vocab = len(AutoTokenizer.from_pretrained(root))
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {
        **shared,
        "vocab_size": vocab,
        "hidden_size": 32,
        "max_position_embeddings": tokenizers.MAX_LENGTH,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
    }
    vision = {**shared, "hidden_size": 40, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    randomise(CLIPModel(config)).save_pretrained(root)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def vit_directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders") / "tiny-dino"
    config = ViTConfig(
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    randomise(ViTModel(config)).save_pretrained(root)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=3).save_pretrained(root)
    return root


def images_8bit(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def as_float(images: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(images, jnp.float32) / 255.0


def test_clip_features_equal_transformers(clip_directory):
    encoder, variables = load_encoder(clip_directory)
    assert (encoder.name, encoder.dim, encoder.text_length) == (
        "tiny-clip",
        24,
        tokenizers.MAX_LENGTH,
    )
    assert encoder.network == str(clip_directory)
    images = images_8bit(3, 32, 32, 3)
    ids = encoder.tokenize(CAPTIONS)
    assert ids.shape == (3, tokenizers.MAX_LENGTH) and ids.dtype == np.int32
    image = jax.jit(encoder.image_features)(variables, as_float(images))
    text = jax.jit(encoder.text_features)(variables, ids)
    logits = encoder.logit_scale(variables) * unit(image) @ unit(text).T
    assert image.shape == text.shape == (3, 24)
    assert image.dtype == text.dtype == jnp.float32

    model = CLIPModel.from_pretrained(clip_directory).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_directory)(list(images))["pixel_values"]
    tokens = AutoTokenizer.from_pretrained(clip_directory)(
        CAPTIONS, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model(pixel_values=torch.tensor(np.stack(pixels)), **tokens).logits_per_image
        features = model.get_image_features(torch.tensor(np.stack(pixels))).pooler_output
    scale = np.abs(theirs.numpy()).max()
    assert np.abs(np.asarray(logits) - theirs.numpy()).max() < 1e-5 * scale
    # Features are given as the model gives them, not normalised.
    np.testing.assert_allclose(image, features.numpy(), atol=1e-5 * np.abs(features).max().item())


@pytest.mark.parametrize("side", [32, 64])
def test_vit_features_equal_transformers(vit_directory, side):
    """Also of images of another size, which are resized in the graph."""
    encoder, variables = load_encoder(vit_directory)
    assert (encoder.name, encoder.dim) == ("tiny-dino", 36)
    assert encoder.text_features is None and encoder.logit_scale is None
    images = images_8bit(3, side, side, 3)
    ours = np.asarray(jax.jit(encoder.image_features)(variables, as_float(images)))
    pixels = ViTImageProcessorPil.from_pretrained(vit_directory)(list(images))["pixel_values"]
    model = ViTModel.from_pretrained(vit_directory).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(np.stack(pixels))).last_hidden_state[:, 0].numpy()
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    with pytest.raises(ValueError, match="'tiny-dino' takes images only"):
        encoder.tokenize(CAPTIONS)


def test_dinov2_features_equal_transformers(tmp_path):
    """A crop smaller than the grid that the positions were learned on, as in published models."""
    root = tmp_path / "tiny-dinov2"
    config = Dinov2Config(
        hidden_size=36, num_hidden_layers=2, num_attention_heads=3, image_size=63, patch_size=7
    )
    model = randomise(Dinov2Model(config))
    model.save_pretrained(root)
    size = {"height": 28, "width": 28}
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    processor.save_pretrained(root)
    images = images_8bit(2, 48, 64, 3)
    encoder, variables = load_encoder(root)
    ours = np.asarray(jax.jit(encoder.image_features)(variables, as_float(images)))
    pixels = torch.tensor(np.stack(processor(list(images))["pixel_values"]))
    with torch.no_grad():
        theirs = model(pixels).pooler_output.numpy()
    assert pixels.shape[-2:] == (28, 28)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_features_have_a_gradient_and_weights_are_arguments(vit_directory):
    encoder, variables = load_encoder(vit_directory)
    images = as_float(images_8bit(1, 40, 40, 3))
    loss = jax.jit(jax.grad(lambda p, x: encoder.image_features(p, x).sum(), argnums=1))
    gradient = loss(variables, images)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    zeros = jax.tree.map(jnp.zeros_like, variables)
    assert not jax.jit(encoder.image_features)(zeros, images).any()


def test_bf16_features_are_fp32(clip_directory):
    encoder, variables = load_encoder(clip_directory, dtype=jnp.bfloat16)
    params = dict(variables["params"])
    assert params.pop("logit_scale").dtype == np.float32  # a lone scalar stays exact
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    images = as_float(images_8bit(2, 32, 32, 3))
    half = jax.jit(encoder.image_features)(variables, images)
    full, params = load_encoder(clip_directory)
    exact = jax.jit(full.image_features)(params, images)
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    "file, key, value, message",
    [
        ("config.json", "model_type", "swin", "= 'swin' .* supported: 'clip', 'blip', 'vit'"),
        ("config.json", "model_type", [], r"= \[\] .* supported: 'clip', 'blip', 'vit'"),
        ("config.json", "num_hidden_layers", 10**7, "= 10000000 .* number from 1 to 1000"),
        ("config.json", "num_hidden_layers", "2", "= '2' .* a whole number from 1 to 1000"),
        ("config.json", "num_attention_heads", 0, "= 0 .* a whole number from 1 to 1048576"),
        ("config.json", "image_size", 10**6, "= 1000000 .* a whole number from 1 to 4096"),
        ("config.json", "patch_size", 64, "with patch_size = 64 it makes 0 patches a side"),
        ("config.json", "qkv_bias", 1, "= 1 .* true or false"),
        ("config.json", "layer_norm_eps", "x", "= 'x' .* a number from 0 to 1"),
        ("preprocessor_config.json", "resample", 5, "= 5 is not supported; supported: 2, 3"),
        ("preprocessor_config.json", "size", "x", "= 'x' .* a whole number from 1 to 4096"),
        ("preprocessor_config.json", "image_mean", [1, 2], r"= \[1, 2\] .* 3 numbers"),
        ("preprocessor_config.json", "image_std", [0, 1, 1], "= 0 .* a number from 1e-06"),
        ("preprocessor_config.json", "do_rescale", "no", "= 'no' .* true or false"),
    ],
)
def test_a_damaged_config_is_a_sentence(vit_directory, tmp_path, file, key, value, message):
    copy = tmp_path / "copy"
    shutil.copytree(vit_directory, copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(content | {key: value}))
    named = rf"copy/{file}: ({key}|image_size = 32 is not supported:) {message}"
    with pytest.raises(WeightsError, match=named):
        load_encoder(copy)


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("text_config", "num_hidden_layers", 10**7, "num_hidden_layers = 10000000"),
        ("text_config", "vocab_size", -5, "vocab_size = -5"),
        ("vision_config", "hidden_size", "x", "hidden_size = 'x'"),
        ("vision_config", None, 5, "vision_config = 5 .* an object"),
        ("text_config", None, "x", "text_config = 'x' .* an object"),
        (None, "projection_dim", 0, "projection_dim = 0"),
        (None, "logit_scale_init_value", "x", "logit_scale_init_value = 'x' .* a finite number"),
    ],
)
def test_of_a_nested_one_too(clip_directory, tmp_path, section, key, value, message):
    copy = tmp_path / "copy"
    shutil.copytree(clip_directory, copy)
    content = json.loads((copy / "config.json").read_text())
    if key is None:
        content[section] = value
    else:
        (content[section] if section else content)[key] = value
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=rf"copy/config\.json: {message}"):
        load_encoder(copy)


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        ("text_cfg", "width", "x", "width = 'x' is not supported: it must be a whole number"),
        ("vision_cfg", "head_width", 0, "head_width = 0 is not supported"),
        ("vision_cfg", "mlp_ratio", "x", "mlp_ratio = 'x' is not supported"),
        ("vision_cfg", "layers", 10**7, "num_hidden_layers = 10000000 is not supported"),
        ("text_cfg", "heads", "x", "num_attention_heads = 'x' is not supported"),
        ("text_cfg", "width", None, "width = None is not supported"),
    ],
)
def test_of_open_clips_too(tmp_path, part, key, value, message):
    model = json.loads(json.dumps(OPEN_CLIP))
    model["model_cfg"][part][key] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(model))
    with pytest.raises(WeightsError, match=rf"open_clip_config\.json: ({message})"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("image_size", 40, r"makes images of \(32, 32\)"),
        ("hidden_size", 48, r"expected \[1, 1, 48\]"),
    ],
)
def test_files_that_do_not_fit_each_other(vit_directory, tmp_path, key, value, message):
    copy = tmp_path / "copy"
    shutil.copytree(vit_directory, copy)
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(WeightsError, match=message):
        load_encoder(copy)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")
