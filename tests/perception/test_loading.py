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
    "file, key, value, error, message",
    [
        (
            "config.json",
            "model_type",
            "swin",
            ValueError,
            "'swin' .* known: 'clip', 'blip', 'vit'",
        ),
        ("config.json", "image_size", 40, ValueError, r"makes images of \(32, 32\)"),
        ("config.json", "hidden_size", 48, WeightsError, r"expected \[1, 1, 48\]"),
        ("preprocessor_config.json", "resample", 5, ValueError, "resample = 5"),
    ],
)
def test_bad_directory_is_named(vit_directory, tmp_path, file, key, value, error, message):
    copy = tmp_path / "copy"
    shutil.copytree(vit_directory, copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(error, match=message):
        load_encoder(copy)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")
