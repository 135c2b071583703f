"""A whole RL run of each family at tiny size: train, save, resume, sample, export."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pec_jax.families.flux import Flux1
from pec_jax.families.tiny import write_pipeline
from pec_jax.inference import draw as sampling
from pec_jax.inference import export as exporting
from pec_jax.training import trainer as train_lib
from pec_jax.weights.tensors import read_tensors
from tests.conftest import small_config_dict
from tests.families.test_tiny import PROMPTS, diffusers_latents
from tests.weights.test_single_files import ALL_IN_ONE, checkpoint, flux_shapes

GUIDANCE = 3.5


def family_config(root):
    config = small_config_dict()
    config.num_iterations = 2
    # FLUX does not say for which size it was trained: diffusers takes 128 latent pixels.
    config.model.update({"path": str(root), "height": 32, "width": 32})
    config.sampler.guidance = GUIDANCE
    config.perception.update({"k": 1})
    config.constraints.pec.update({"weight": 1.0, "unit": "reward_std"})
    config.updates.minibatches = 2
    # Large steps: what two iterations learn must show in an image.
    config.optimizer.learning_rate = 0.02
    config.eval.guidance = GUIDANCE
    config.schedule.checkpoint_every = 1
    return config


@pytest.fixture(scope="module", params=["sd3", "flux"])
def run(request, tmp_path_factory):
    """(family, model directory, run directory) after two iterations, the second after a resume."""
    directory = tmp_path_factory.mktemp(request.param)
    root = write_pipeline(directory / "model", request.param)
    config = family_config(root)
    config.num_iterations = 1
    train_lib.train(config, directory / "run")
    config.num_iterations = 2
    train_lib.train(config, directory / "run", allow_config_change=True)
    return request.param, root, directory / "run"


def test_reward_entropy_and_update_are_there(run):
    _, _, directory = run
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert np.isfinite([step["reward/mean"], step["entropy/perceptual"]]).all()
        assert step["policy/grad_norm"] > 0 and step["policy/ratio_max_deviation"] == 0
        assert step["diversity/variance_perceptual"] > 0 and step["constraint/pec/weight"] == 1
    result = json.loads((directory / "eval.json").read_text())
    assert result["quality/pickscore"] != result["base/quality/pickscore"]


def test_what_was_learned_is_the_same_in_diffusers(run, tmp_path):
    family, root, directory = run
    start = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "start.npy", start)
    request = sampling.Request(
        model=str(root),
        lora=str(directory),
        prompts=PROMPTS,
        num_images=1,
        num_steps=10,
        height=32,
        width=32,
        guidance=GUIDANCE,
        init_latents=str(tmp_path / "start.npy"),
    )
    sampling.run(request, tmp_path / "ours")
    found = np.load(tmp_path / "ours" / "latents.npy")
    untrained = dataclasses.replace(request, lora=None)
    sampling.run(untrained, tmp_path / "base")
    base = np.load(tmp_path / "base" / "latents.npy")
    assert np.abs(found - base).max() > 0.1 * base.std()

    exporting.run(directory, "lora", tmp_path / "lora")
    expected = diffusers_latents(
        root,
        family,
        start,
        32,
        32,
        GUIDANCE,
        prepare=lambda p: p.load_lora_weights(tmp_path / "lora"),
    )
    assert np.abs(found - expected).max() < 1e-3 * expected.std()

    exporting.run(directory, "transformer", tmp_path / "transformer")
    network = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}[family]
    merged = getattr(diffusers, network).from_pretrained(tmp_path / "transformer")
    expected = diffusers_latents(
        root, family, start, 32, 32, GUIDANCE, prepare=lambda p: setattr(p, "transformer", merged)
    )
    assert np.abs(found - expected).max() < 1e-3 * expected.std()

    again = dataclasses.replace(request, lora=str(tmp_path / "lora"))
    sampling.run(again, tmp_path / "again")
    np.testing.assert_allclose(np.load(tmp_path / "again" / "latents.npy"), found, atol=1e-4)


def test_from_a_transformer_by_its_publishers_names(tmp_path):
    root, file = write_pipeline(tmp_path / "model", "flux"), tmp_path / "flux1-tiny.safetensors"
    state = checkpoint(flux_shapes(Flux1.tiny), torch.float32, ALL_IN_ONE)
    state = {name: 0.1 * tensor for name, tensor in state.items()}
    save_file(state, file)
    config = family_config(root)
    config.num_iterations = 1
    config.model.transformer = str(file)
    train_lib.train(config, tmp_path / "run")
    exporting.run(tmp_path / "run", "transformer", tmp_path / "export")
    exported = read_tensors(tmp_path / "export")
    last = state[f"{ALL_IN_ONE}final_layer.linear.weight"]  # which the LoRA does not change
    np.testing.assert_array_equal(exported["proj_out.weight"], last.numpy())
    projections = state[f"{ALL_IN_ONE}double_blocks.0.img_attn.qkv.weight"]
    learned = exported["transformer_blocks.0.attn.to_q.weight"] - projections.chunk(3)[0].numpy()
    assert 0 < np.abs(learned).max() < 0.1
    card = (tmp_path / "export" / "README.md").read_text()
    assert "- Transformer before training: flux1-tiny.safetensors" in card
    assert str(tmp_path) not in card
