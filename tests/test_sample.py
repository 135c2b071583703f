"""The sample command against diffusers, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.numpy import save_file

from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.pipeline import load_pipeline
from pec_jax.inference import draw as sampling
from pec_jax.models import vae
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.weights.tensors import read_tensors

PROMPTS = ("a small red cat in the snow", "a thing", "two large blue stars at the top")
LENGTH = tokenizers.MAX_LENGTH  # of the embedded T5


@pytest.fixture(scope="module", autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def oracle():
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline.from_pretrained(SHAPES_DIRECTORY, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours():
    return load_pipeline(SHAPES_DIRECTORY)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Initial latents [3, C, h, w], as an array and as a file."""
    latents = np.random.default_rng(0).normal(size=(3, 4, 16, 16)).astype(np.float32)
    path = tmp_path_factory.mktemp("latents") / "start.npy"
    np.save(path, latents)
    return latents, path


def relative(a, b):
    """Largest difference in units of the reference's standard deviation."""
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.asarray(b).std()


@pytest.mark.parametrize("num_steps", [10, 28])
def test_final_latents_are_those_of_diffusers(tmp_path, oracle, start, num_steps):
    latents, path = start
    request = sampling.Request(
        model="shapes",
        prompts=PROMPTS,
        num_images=1,
        num_steps=num_steps,
        guidance=4.5,
        init_latents=str(path),
    )
    sampling.run(request, tmp_path)
    expected = oracle(
        list(PROMPTS),
        latents=torch.from_numpy(latents),
        num_inference_steps=num_steps,
        guidance_scale=4.5,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images.numpy()
    found = np.load(tmp_path / "latents.npy")
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert relative(found, expected) < 1e-3  # 28 guided steps amplify rounding


def test_each_prompt_has_its_own_negative_as_in_diffusers(tmp_path, oracle, start):
    latents, path = start
    own = ("blue", "", None)
    lines = [
        {"prompt": p} | ({"negative_prompt": n} if n is not None else {})
        for p, n in zip(PROMPTS, own)
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = sampling.Request(
        model="shapes",
        prompt_file=str(file),
        negative_prompt="a green star",
        num_images=1,
        num_steps=5,
        guidance=4.5,
        init_latents=str(path),
        batch_size=2,  # of which the last wraps around
    )
    sampling.run(request, tmp_path / "out")
    found = np.load(tmp_path / "out" / "latents.npy")

    def theirs(negatives):
        return oracle(
            list(PROMPTS),
            negative_prompt=negatives,
            latents=torch.from_numpy(latents),
            num_inference_steps=5,
            guidance_scale=4.5,
            max_sequence_length=LENGTH,
            output_type="latent",
        ).images.numpy()

    assert relative(found, theirs(["blue", "", "a green star"])) < 1e-3
    assert relative(found, theirs(["", "", ""])) > 0.05  # they do matter
    listed = [json.loads(x) for x in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [line.get("negative_prompt") for line in listed] == list(own)


def test_another_transformer_in_place_of_the_pipelines_own(tmp_path):
    other, whole = tmp_path / "transformer", tmp_path / "whole"
    shutil.copytree(SHAPES_DIRECTORY / "transformer", other)
    tensors = {name: tensor * 1.1 for name, tensor in read_tensors(other).items()}
    for path in other.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, other / "diffusion_pytorch_model.safetensors")
    shutil.copytree(SHAPES_DIRECTORY, whole, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(other, whole / "transformer")
    request = sampling.Request(model="shapes", prompts=("a thing",), num_images=1, num_steps=2)

    def latents(name, **changes):
        sampling.run(dataclasses.replace(request, **changes), tmp_path / name)
        return np.load(tmp_path / name / "latents.npy")

    found = latents("found", transformer=str(other))
    np.testing.assert_array_equal(found, latents("expected", model=str(whole)))
    assert relative(found, latents("own")) > 0.01  # it does matter


def test_a_negative_prompt_without_effect_is_said(ours, caplog):
    request = sampling.Request(
        model="shapes",
        prompts=("a thing",),
        negative_prompt="blue",
        num_images=1,
        num_steps=1,
        guidance=1.0,
    )
    with caplog.at_level("WARNING"):
        sampling.draw(request, ours, ours.transformer_variables, np.zeros((1, 16, 16, 4)))
    assert "Negative prompts change nothing: at --guidance=1" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("a \udcff",)}, "the byte 0xFF"),
        ({"prompts": ("a",), "negative_prompt": "\ud83d"}, "one half of a character"),
    ],
)
def test_text_that_is_none_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sampling.run(sampling.Request(model="/no/such", **changes), tmp_path)


def test_text_embeddings_are_those_of_diffusers(oracle, ours):
    with torch.no_grad():
        tokens, _, pooled, _ = oracle.encode_prompt(
            list(PROMPTS), None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
    found = ours.text.encode(list(PROMPTS))
    assert relative(found.tokens, tokens) < 1e-5
    assert relative(found.pooled, pooled) < 1e-5


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.05])
def test_a_velocity_is_that_of_diffusers(oracle, ours, start, sigma):
    latents, _ = start
    conditioning = ours.text.encode(list(PROMPTS))
    timestep = np.full(3, 1000 * sigma, np.float32)
    with torch.no_grad():
        expected = oracle.transformer(
            torch.from_numpy(latents),
            torch.from_numpy(np.asarray(conditioning.tokens)),
            torch.from_numpy(np.asarray(conditioning.pooled)),
            torch.from_numpy(timestep),
        ).sample
    found = ours.transformer.apply(
        ours.transformer_variables,
        latents.transpose(0, 2, 3, 1),
        timestep,
        conditioning.tokens,
        conditioning.pooled,
    )
    assert relative(np.transpose(found, (0, 3, 1, 2)), expected) < 1e-5


def test_the_autoencoder_is_that_of_diffusers(oracle, ours):
    images = np.random.default_rng(1).uniform(-1, 1, size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        distribution = oracle.vae.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist
        decoded = oracle.vae.decode(distribution.mean).sample
    mean, logvar = ours.vae.apply(ours.vae_variables, images, method="encode")
    assert relative(np.transpose(mean, (0, 3, 1, 2)), distribution.mean) < 1e-4
    assert relative(np.transpose(logvar, (0, 3, 1, 2)), distribution.logvar) < 1e-4
    found = ours.vae.apply(ours.vae_variables, mean, method="decode")
    assert relative(np.transpose(found, (0, 3, 1, 2)), decoded) < 1e-4
    config = ours.vae.config
    assert config.scaling_factor == oracle.vae.config.scaling_factor
    np.testing.assert_allclose(
        vae.unscale_latents(config, vae.scale_latents(config, mean)), mean, atol=1e-5
    )


def test_files_of_a_sample(tmp_path):
    request = sampling.Request(
        model="shapes", prompts=PROMPTS[:2], num_images=3, num_steps=2, guidance=1.0, batch_size=4
    )
    sampling.run(request, tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    images = [f"{i:05d}.png" for i in range(6)]
    assert names == [*images, "grid.png", "images.jsonl", "latents.npy"]
    assert np.load(tmp_path / "latents.npy").shape == (6, 4, 16, 16)
    with Image.open(tmp_path / "00000.png") as image:
        assert image.size == (64, 64)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size[0] > 3 * 64


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(tmp_path):
    for size in (1, 3):
        request = sampling.Request(
            model="shapes",
            prompts=PROMPTS[:1],
            num_images=3,
            num_steps=3,
            guidance=2.0,
            batch_size=size,
            height=48,
            width=32,
        )
        sampling.run(request, tmp_path / str(size))
    one, three = (np.load(tmp_path / str(size) / "latents.npy") for size in (1, 3))
    assert one.shape == (3, 4, 12, 8)
    np.testing.assert_allclose(one, three, atol=1e-4)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 4, 16, 16), np.float32), np.zeros((1, 4, 16, 16), np.int64)]
)
def test_latents_of_the_wrong_kind_are_refused(tmp_path, array):
    np.save(tmp_path / "bad.npy", array)
    request = sampling.Request(
        model="shapes", prompts=PROMPTS, num_images=1, init_latents=str(tmp_path / "bad.npy")
    )
    with pytest.raises(ValueError, match=r"bad\.npy .* floats of shape \(3, 4, 16, 16\)"):
        sampling.run(request, tmp_path)


def broken_latents(kind, path):
    """A file that holds no start for three images."""
    good = np.zeros((3, 4, 16, 16), np.float64)
    if kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=good)
    elif kind == "bad zip":
        path.write_bytes(b"PK\x03\x04 and no zip")
    elif kind == "absurd shape":
        np.save(path, good)
        header = path.read_bytes().replace(b"(3, 4, 16, 16), }", b"(3000000, 99999),}")
        path.write_bytes(header)
    else:
        good[0, 0, 0, 0] = {"nan": np.nan, "overflow": 1e300}[kind]
        np.save(path, good)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("npz", "is an .npz archive"),
        ("bad zip", "is not a .npy file of numbers"),
        ("absurd shape", "is not a .npy file of numbers"),
        ("nan", "not finite in float32"),
        ("overflow", "not finite in float32"),
    ],
)
def test_files_that_hold_no_latents_are_refused(tmp_path, kind, words):
    broken_latents(kind, tmp_path / "bad.npy")
    request = sampling.Request(
        model="shapes", prompts=PROMPTS, num_images=1, init_latents=str(tmp_path / "bad.npy")
    )
    with pytest.raises(ValueError, match=words):
        sampling.initial_latents(request, 3, (16, 16, 4))


def test_what_a_run_has_learned_is_applied(tmp_path, small_config):
    from pec_jax.training.trainer import train

    small_config.update({"num_iterations": 1})
    small_config.optimizer.learning_rate = 0.5  # so that one iteration shows
    small_config.schedule.update({"sample_every": 0, "checkpoint_every": 0, "eval_every": 0})
    train(small_config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_iterations"] == 1
    latents = []
    for lora, use_ema in (
        (None, True),
        (str(tmp_path / "run"), True),
        (str(tmp_path / "run"), False),
    ):
        request = sampling.Request(
            model="shapes",
            prompts=("a thing",),
            lora=lora,
            use_ema=use_ema,
            num_images=2,
            num_steps=2,
            guidance=1.0,
        )
        sampling.run(request, tmp_path / "out")
        latents.append(np.load(tmp_path / "out" / "latents.npy"))
    base, ema, last = latents
    assert np.abs(ema - base).max() > 1e-3
    assert np.abs(last - ema).max() > 1e-3
