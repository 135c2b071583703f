"""Small random pipelines of both families: diffusers loads them, and our sampler agrees with it."""

from __future__ import annotations

import diffusers
import jax
import numpy as np
import pytest
import torch

from pec_jax.families.pipeline import load_pipeline
from pec_jax.families.tiny import write_pipeline
from pec_jax.inference import draw as sampling
from pec_jax.io import read_json, write_json
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.weights.tensors import WeightsError

PROMPTS = ("a small red cat in the snow", "a thing")
T5_LENGTH = tokenizers.MAX_LENGTH  # of the embedded T5
# Name -> (family, transformer entries, height, width).
CASES = {
    "sd3 default": ("sd3", {}, 32, 32),
    "sd3 no dual attention, no qk norm": (
        "sd3",
        {"dual_attention_layers": [], "qk_norm": None, "num_layers": 2},
        24,
        40,
    ),
    "sd3 all dual": ("sd3", {"dual_attention_layers": [0, 1, 2]}, 16, 48),
    "sd3 deep": ("sd3", {"num_layers": 6, "dual_attention_layers": [0, 1]}, 32, 16),
    "sd3 big heads": (
        "sd3",
        {"num_attention_heads": 1, "attention_head_dim": 48, "caption_projection_dim": 48},
        32,
        32,
    ),
    "sd3 one layer": ("sd3", {"num_layers": 1, "dual_attention_layers": []}, 40, 8),
    "flux default": ("flux", {}, 32, 32),
    "flux without guidance": ("flux", {"guidance_embeds": False}, 24, 40),
    "flux no single layers": ("flux", {"num_single_layers": 0}, 16, 48),
    "flux deep": ("flux", {"num_layers": 1, "num_single_layers": 6}, 32, 16),
    "flux big heads": (
        "flux",
        {"num_attention_heads": 1, "attention_head_dim": 40, "axes_dims_rope": [8, 16, 16]},
        32,
        32,
    ),
    "flux many heads": (
        "flux",
        {"num_attention_heads": 4, "attention_head_dim": 8, "axes_dims_rope": [2, 2, 4]},
        40,
        8,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def diffusers_latents(
    root, family, start, height, width, guidance, prepare=lambda pipe: None
) -> np.ndarray:
    """diffusers' final latents [N, C, h, w] after 10 steps from `start`."""
    torch.manual_seed(0)
    common = {
        "height": height,
        "width": width,
        "num_inference_steps": 10,
        "guidance_scale": guidance,
        "max_sequence_length": T5_LENGTH,
        "output_type": "latent",
    }
    if family == "sd3":
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(root)
        pipe.set_progress_bar_config(disable=True)
        prepare(pipe)
        return pipe(list(PROMPTS), latents=torch.from_numpy(start), **common).images.numpy()
    pipe = diffusers.FluxPipeline.from_pretrained(root)
    pipe.set_progress_bar_config(disable=True)
    prepare(pipe)
    n, channels, h, w = start.shape
    packed = pipe._pack_latents(torch.from_numpy(start), n, channels, h, w)
    out = pipe(list(PROMPTS), latents=packed, **common).images
    return pipe._unpack_latents(out, height, width, pipe.vae_scale_factor).numpy()


@pytest.mark.parametrize("name", CASES)
def test_final_latents_are_those_of_diffusers(tmp_path, name):
    family, transformer, height, width = CASES[name]
    root = write_pipeline(tmp_path / "model", family, transformer)
    start = np.random.default_rng(0).normal(size=(2, 4, height // 4, width // 4))
    start = start.astype(np.float32)
    np.save(tmp_path / "start.npy", start)
    # What diffusers does not embed it ignores; to us it would be classifier-free guidance.
    guidance = 1.0 if transformer.get("guidance_embeds") is False else 3.5
    request = sampling.Request(
        model=str(root),
        prompts=PROMPTS,
        num_images=1,
        height=height,
        width=width,
        num_steps=10,
        guidance=guidance,
        init_latents=str(tmp_path / "start.npy"),
    )
    sampling.run(request, tmp_path / "out")
    found = np.load(tmp_path / "out" / "latents.npy")
    expected = diffusers_latents(root, family, start, height, width, guidance)
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_text_is_that_of_diffusers(tmp_path, family):
    root = write_pipeline(tmp_path / "model", family)
    pipeline = load_pipeline(root)
    found = pipeline.text.encode(list(PROMPTS))
    # What ahead-of-time compilation takes them to be, from config files alone.
    assert jax.tree.map(lambda a: a.shape, pipeline.conditioning_shapes()) == jax.tree.map(
        lambda a: a.shape[1:], found
    )
    with torch.no_grad():
        if family == "sd3":
            pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(root)
            tokens, _, pooled, _ = pipe.encode_prompt(
                list(PROMPTS), None, None, max_sequence_length=T5_LENGTH
            )
        else:
            pipe = diffusers.FluxPipeline.from_pretrained(root)
            tokens, pooled, _ = pipe.encode_prompt(list(PROMPTS), max_sequence_length=T5_LENGTH)
    for ours, theirs in ((found.tokens, tokens), (found.pooled, pooled)):
        assert np.abs(ours - theirs.numpy()).max() < 1e-5 * theirs.numpy().std()


def test_without_the_third_text_encoder_zeros_stand_in_its_place(tmp_path):
    root = write_pipeline(tmp_path / "model", "sd3")
    index = read_json(root / "model_index.json")
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    write_json(root / "model_index.json", index)
    found = load_pipeline(root, t5_length=9).text.encode(list(PROMPTS))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        root, text_encoder_3=None, tokenizer_3=None
    )
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(list(PROMPTS), None, None, max_sequence_length=9)
    assert found.tokens.shape == tokens.shape
    assert np.abs(found.tokens - tokens.numpy()).max() < 1e-5
    assert np.abs(found.pooled - pooled.numpy()).max() < 1e-5
    assert not found.tokens[:, -9:].any()


def test_the_same_seed_gives_the_same_weights(tmp_path):
    a, b, c = (
        load_pipeline(write_pipeline(tmp_path / name, "flux", seed=seed), text=False)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    leaves = [jax.tree.leaves(p.transformer_variables) for p in (a, b, c)]
    assert all((x == y).all() for x, y in zip(leaves[0], leaves[1]))
    assert any((x != y).any() for x, y in zip(leaves[0], leaves[2]))


class TestClearErrors:
    def test_unknown_family(self, tmp_path):
        with pytest.raises(ValueError, match=r"unknown family 'flix'.*Did you mean 'flux'.*sd3"):
            write_pipeline(tmp_path / "model", "flix")

    def test_existing_directory(self, tmp_path):
        with pytest.raises(FileExistsError, match="choose a directory that does not"):
            write_pipeline(tmp_path, "sd3")

    def test_bad_config_leaves_nothing_behind(self, tmp_path):
        with pytest.raises(WeightsError, match="caption_projection_dim"):
            write_pipeline(tmp_path / "model", "sd3", {"num_attention_heads": 3})
        assert not list(tmp_path.iterdir())

    def test_mixed_families(self, tmp_path):
        root = write_pipeline(tmp_path / "model", "sd3")
        other = write_pipeline(tmp_path / "other", "flux")
        (root / "transformer").rename(tmp_path / "aside")
        (other / "transformer").rename(root / "transformer")
        with pytest.raises(WeightsError, match="is a FluxTransformer2DModel; supported: SD3"):
            load_pipeline(root)

    def test_unknown_pipeline(self, tmp_path):
        root = write_pipeline(tmp_path / "model", "sd3")
        write_json(root / "model_index.json", {"_class_name": "StableDiffusionXLPipeline"})
        with pytest.raises(WeightsError, match="StableDiffusionXLPipeline; supported: Stable"):
            load_pipeline(root)
