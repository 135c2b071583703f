"""In-graph preprocessing against Pillow and the image processors of transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pec_jax.perception.preprocessing import (
    FLOAT,
    Preprocessor,
    resize,
    resize_float,
    resize_weights,
    to_uint8_levels,
)

BILINEAR, BICUBIC = 2, 3


def noise(*shape: int) -> np.ndarray:
    """8-bit noise: the hardest case, as every cubic overshoot is cut at black or white."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
@pytest.mark.parametrize(
    "size, new_size",
    [
        ((48, 48), (32, 32)),
        ((64, 64), (32, 32)),
        ((50, 37), (32, 24)),
        ((20, 20), (32, 32)),
        ((48, 32), (32, 32)),
        ((300, 512), (224, 224)),
    ],
)
def test_resize_equals_pillow(size, new_size, resample):
    image = noise(*size, 3)
    expected = np.asarray(Image.fromarray(image).resize(new_size[::-1], resample), np.int32)
    ours = resize(jnp.asarray(image)[None] / 255.0, *new_size, resample)[0] * 255.0
    np.testing.assert_allclose(ours, expected, atol=1e-4)  # every level, to the last bit


def test_resize_of_the_right_size_changes_nothing():
    images = np.random.default_rng(0).random((2, 8, 6, 3)).astype(np.float32)  # not 8-bit
    np.testing.assert_array_equal(resize(images, 8, 6, BICUBIC), images)


def test_resize_weights_keep_constants_and_are_symmetric():
    for resample in (BILINEAR, BICUBIC):
        matrix = resize_weights(13, 5, resample)
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-6)
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)


def test_levels_are_those_of_a_saved_png():
    images = np.linspace(-0.2, 1.2, 1001, dtype=np.float32)
    levels = np.asarray(to_uint8_levels(images))
    saved = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    np.testing.assert_allclose(levels, saved / 255.0, atol=1e-6)
    gradient = jax.grad(lambda x: to_uint8_levels(x).sum())(jnp.array([-0.5, 0.3, 1.5]))
    np.testing.assert_allclose(gradient, [0.0, 1.0, 0.0])


CLIP_CONFIG = {
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "do_center_crop": True,
}
VIT_CONFIG = {"size": {"height": 32, "width": 32}, "resample": 2}


@pytest.mark.parametrize(
    "kind, processor, config",
    [
        ("clip", CLIPImageProcessorPil, CLIP_CONFIG),
        ("clip", CLIPImageProcessorPil, CLIP_CONFIG | {"crop_size": {"height": 20, "width": 27}}),
        ("clip", CLIPImageProcessorPil, CLIP_CONFIG | {"do_normalize": False}),
        ("vit", ViTImageProcessorPil, VIT_CONFIG),
        ("vit", ViTImageProcessorPil, VIT_CONFIG | {"image_mean": [0.1, 0.2, 0.3]}),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (40, 61)])
def test_equals_the_processor(kind, processor, config, size):
    images = noise(2, *size, 3)
    expected = processor(**config)(list(images), return_tensors="np")["pixel_values"]
    expected = expected.transpose(0, 2, 3, 1)
    preprocess = Preprocessor.from_dict(config, kind)
    ours = np.asarray(jax.jit(preprocess)(jnp.asarray(images) / 255.0))
    assert ours.shape == expected.shape
    assert ours.shape[1:3] == preprocess.output_size(*size)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_defaults_are_those_of_the_processors():
    images = noise(1, 256, 240, 3)
    for kind, processor in (("clip", CLIPImageProcessorPil), ("vit", ViTImageProcessorPil)):
        expected = processor()(list(images), return_tensors="np")["pixel_values"]
        ours = Preprocessor.from_dict({}, kind)(jnp.asarray(images) / 255.0)
        np.testing.assert_allclose(ours, expected.transpose(0, 2, 3, 1), atol=1e-5)


def test_old_files_hold_sizes_as_numbers():
    old = Preprocessor.from_dict({"size": 32, "crop_size": 32}, "clip")
    assert old == Preprocessor.from_dict(CLIP_CONFIG, "clip")
    assert Preprocessor.from_dict({"size": 32}, "vit") == Preprocessor.from_dict(VIT_CONFIG, "vit")


@pytest.mark.parametrize("size", [(512, 512), (768, 768), (1024, 1024), (640, 480), (333, 517)])
@pytest.mark.parametrize("kind", ["clip", "siglip", "blip", "hps"])
def test_levels_equal_pillows(kind, size):
    """At the sizes that models draw, for every way to resize: none off by more than one level."""
    side = 64  # of the encoder; it makes no difference to the arithmetic
    configs = {
        "clip": {"size": {"shortest_edge": side}, "crop_size": side},
        "siglip": {"size": {"height": side, "width": side}},
        "blip": {"size": {"shortest_edge": side}, "crop_size": side, "do_center_crop": True},
        "hps": {"size": {"longest_edge": side}, "do_center_crop": False, "do_pad": True},
    }
    model = "clip" if kind == "hps" else kind
    preprocess = Preprocessor.from_dict({**configs[kind], "do_normalize": False}, model)
    image = np.kron(noise(size[0] // 8 + 1, size[1] // 8 + 1, 3), np.ones((8, 8, 1), np.uint8))
    image = image[: size[0], : size[1]]
    ours = np.asarray(preprocess(jnp.asarray(image)[None] / 255.0)[0]) * 255.0
    off = np.abs(ours - by_pillow(image, kind, side).astype(np.float32))
    assert (off < 1e-3).mean() >= 0.99 and off.max() < 1 + 1e-3


def by_pillow(image: np.ndarray, kind: str, side: int) -> np.ndarray:
    """The published preprocessing, by Pillow's own functions."""
    picture = Image.fromarray(image)
    width, height = picture.size
    if kind == "siglip":
        return np.asarray(picture.resize((side, side), Image.BICUBIC))
    if kind == "hps":
        scale = side / max(width, height)
        size = (round(width * scale), round(height * scale))
        square = Image.new("RGB", (side, side))
        square.paste(
            picture.resize(size, Image.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2)
        )
        return np.asarray(square)
    short = min(width, height)
    size = (int(side * width / short), int(side * height / short))
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    picture = picture.resize(size, Image.BICUBIC)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size", [(48, 64), (20, 33)])
def test_without_rounding_it_is_torchs_antialiased_resize(size, resample):
    image = np.random.default_rng(0).random((2, *size, 3)).astype(np.float32)
    mode = {BILINEAR: "bilinear", BICUBIC: "bicubic"}[resample]
    theirs = torch.nn.functional.interpolate(
        torch.tensor(image).permute(0, 3, 1, 2), size=(32, 24), mode=mode, antialias=True
    )
    ours = resize_float(image, 32, 24, resample)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=2e-6)


def test_rounding_is_an_option_that_dinov3_never_had():
    values = {"size": {"height": 32, "width": 32}}
    images = np.random.default_rng(0).random((1, 64, 64, 3)).astype(np.float32)
    rounded = Preprocessor.from_dict(values, "siglip")
    exact = Preprocessor.from_dict(values, "siglip", FLOAT)
    off = np.abs(np.asarray(rounded(images)) - np.asarray(exact(images))).max()
    assert 1e-4 < off < 2 / 127.5
    assert rounded.rounded and not Preprocessor.from_dict(values, "dinov3_vit").rounded


def test_gradient_passes_through_the_resize():
    preprocess = Preprocessor.from_dict(CLIP_CONFIG, "clip")
    images = np.full((1, 48, 48, 3), 0.5, np.float32)
    gradient = jax.grad(lambda x: preprocess(x)[0, 16, 16, 0])(images)
    # Each output pixel is a weighted mean of the input's, divided by the red channel's std.
    np.testing.assert_allclose(gradient.sum(), 1 / preprocess.std[0], rtol=1e-4)
    assert not gradient[..., 1:].any()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"resample": 1}, "resample = 1 is not supported; supported: 2, 3"),
        ({"size": {"longest_edge": 32}}, "do_pad is supported with"),
        ({"do_pad": True}, "do_pad is supported with"),
    ],
)
def test_config_names_what_it_cannot_compute(config, message):
    with pytest.raises(ValueError, match=message):
        Preprocessor.from_dict(config, "clip")


def test_a_crop_must_fit():
    preprocess = Preprocessor.from_dict({"size": 16, "crop_size": 20}, "clip")
    with pytest.raises(ValueError, match=r"crop_size \(20, 20\) is larger"):
        preprocess(np.zeros((1, 32, 32, 3), np.float32))
