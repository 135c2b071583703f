"""A trained run in diffusers: both kinds of export against our own sampler, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from pec_jax.config.schema import from_config_dict, to_dict
from pec_jax.errors import FileError, RunError
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.inference import draw as sampling
from pec_jax.inference import export as exporting
from pec_jax.inference import model_card
from pec_jax.io import write_json
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.training.build import build
from pec_jax.training.checkpoint import Checkpointer
from pec_jax.training.trainer import train
from pec_jax.weights.tensors import WeightsError, read_file
from tests.conftest import ROOT, small_config_dict

PROMPTS = ("a small red cat in the snow", "two large blue stars at the top")
LENGTH = tokenizers.MAX_LENGTH  # of the embedded T5
LORA, WEIGHTS = "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors"
STEPS = 4
CARD = ["README.md", "samples.png", "samples_base.png"]


@pytest.fixture(scope="module", autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A finished run of two iterations that changed the model visibly."""
    directory = tmp_path_factory.mktemp("lora")
    config = small_config_dict()
    config.num_iterations = 2
    config.trainable.alpha = 6.0
    config.optimizer.learning_rate = 0.1
    config.schedule.update({"sample_every": 0, "checkpoint_every": 0, "eval_every": 0})
    train(config, directory)
    return directory


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """The directory of a run that has moved every weight, without the training."""
    directory = tmp_path_factory.mktemp("full")
    config = small_config_dict()
    config.trainable.mode = "full"
    experiment = build(from_config_dict(config))
    write_json(directory / "config.json", to_dict(experiment.config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: a * (1 + 0.05 * rng.normal(size=a.shape).astype(np.float32)), experiment.params
    )
    checkpointer = Checkpointer(directory / "checkpoints", keep=None)
    checkpointer.save(experiment.program.initial_state(params))
    checkpointer.close()
    return directory


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    latents = np.random.default_rng(0).normal(size=(2, 4, 16, 16)).astype(np.float32)
    np.save(path := tmp_path_factory.mktemp("latents") / "start.npy", latents)
    return latents, path


def ours(start, out, lora=None, *, use_ema: bool = True):
    """Final latents [N, C, h, w] of the sample command."""
    request = sampling.Request(
        model="shapes",
        prompts=PROMPTS,
        lora=lora and str(lora),
        use_ema=use_ema,
        num_images=1,
        num_steps=STEPS,
        init_latents=str(start[1]),
        guidance=4.5,
    )
    sampling.run(request, out)
    return np.load(out / "latents.npy")


def theirs(start, lora=None, **parts):
    """Final latents [N, C, h, w] of diffusers."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(SHAPES_DIRECTORY, **parts)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    return pipe(
        list(PROMPTS),
        latents=torch.from_numpy(start[0]),
        num_inference_steps=STEPS,
        guidance_scale=4.5,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images.numpy()


def relative(a, b):
    """Largest difference in units of the reference's standard deviation."""
    return np.abs(a - b).max() / b.std()


def command(*flags):
    """(exit status, everything printed) of the export command."""
    process = subprocess.run(
        [sys.executable, "-m", "pec_jax.export", *flags],
        cwd=ROOT,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return process.returncode, process.stdout + process.stderr


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_lora_samples_the_same_in_diffusers(tmp_path, lora_run, start, use_ema):
    out = tmp_path / "new" / "lora"
    code, output = command(
        f"--workdir={lora_run}", "--kind=lora", f"--out={out}", f"--use_ema={use_ema}"
    )
    assert code == 0, output
    assert "pipe.load_lora_weights" in output
    assert names(out) == sorted([*CARD, LORA])
    expected = ours(start, tmp_path / "run", lora_run, use_ema=use_ema)
    assert relative(expected, ours(start, tmp_path / "base")) > 0.05
    assert relative(theirs(start, lora=out), expected) < 1e-3
    assert relative(ours(start, tmp_path / "file", out), expected) < 1e-4


def test_a_transformer_samples_the_same_in_diffusers(tmp_path, lora_run, start):
    out = tmp_path / "merged"
    code, output = command(f"--workdir={lora_run}", "--kind=transformer", f"--out={out}")
    assert code == 0, output
    assert "SD3Transformer2DModel.from_pretrained" in output
    assert names(out) == sorted([*CARD, "config.json", WEIGHTS])
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(out)
    expected = ours(start, tmp_path / "run", lora_run)
    assert relative(theirs(start, transformer=transformer), expected) < 1e-3


def test_a_run_that_trained_everything(tmp_path, full_run, start):
    out = tmp_path / "full"
    exporting.run(full_run, "transformer", out)
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(out)
    expected = ours(start, tmp_path / "run", full_run)
    assert relative(expected, ours(start, tmp_path / "base")) > 0.05
    assert relative(theirs(start, transformer=transformer), expected) < 1e-3
    with pytest.raises(RunError, match=r"no LoRA: use --kind=transformer"):
        exporting.run(full_run, "lora", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(("kind", "file"), [("lora", LORA), ("transformer", WEIGHTS)])
def test_bfloat16(tmp_path, lora_run, kind, file):
    exporting.run(lora_run, kind, tmp_path / "exact")
    exporting.run(lora_run, kind, tmp_path / "rounded", dtype="bfloat16")
    exact, rounded = (read_file(tmp_path / name / file) for name in ("exact", "rounded"))
    assert set(exact) == set(rounded)
    for name, value in exact.items():
        assert value.dtype == np.float32 and rounded[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(rounded[name], value.astype(rounded[name].dtype))


def test_an_export_replaces_an_export_of_its_kind_only(tmp_path, lora_run):
    exporting.run(lora_run, "lora", tmp_path)
    before = (tmp_path / LORA).read_bytes()
    exporting.run(lora_run, "lora", tmp_path, use_ema=False)
    assert names(tmp_path) == sorted([*CARD, LORA]) and (tmp_path / LORA).read_bytes() != before
    with pytest.raises(RunError, match="only an earlier export of kind transformer"):
        exporting.run(lora_run, "transformer", tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=r"only an earlier export of kind lora .* choose another"):
        exporting.run(lora_run, "lora", tmp_path)


def test_what_others_wrote_is_not_replaced(tmp_path, lora_run):
    """A base model's transformer directory looks like an export, but is none."""
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).write_bytes((SHAPES_DIRECTORY / "transformer" / name).read_bytes())
    with pytest.raises(RunError, match="is not empty"):
        exporting.run(lora_run, "transformer", tmp_path)
    assert (tmp_path / "config.json").is_file()
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(WeightsError, match="truncated"):
        exporting.run(lora_run, "transformer", tmp_path)


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path, lora_run, monkeypatch):
    exporting.run(lora_run, "transformer", tmp_path / "out")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        exporting.run(lora_run, "transformer", tmp_path / "out")
    monkeypatch.undo()
    assert names(tmp_path / "out") == [
        "README.md",
        WEIGHTS,
        *CARD[1:],
    ]  # the old one, and no longer a whole model
    exporting.run(lora_run, "transformer", tmp_path / "out")
    assert "config.json" in names(tmp_path / "out")


def test_a_directory_that_is_no_run_is_answered(tmp_path, lora_run):
    exporting.run(lora_run, "transformer", tmp_path)
    with pytest.raises(RunError, match=r"config\.json cannot be read: .* of another version"):
        exporting.run(tmp_path, "lora", tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileError, match=r"config\.json: not valid JSON"):
        exporting.run(tmp_path, "lora", tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workdir=/no/such/run"], ["/no/such/run", "not a run directory"]),
        (["--workdir={empty}"], ["holds no checkpoint yet"]),
        (["--workdir={run}", "--kind=lorra"], ["lorra", "<lora|transformer>"]),
        (["--workdir={run}", "--out=/proc/nothing/here"], ["/proc/nothing"]),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(tmp_path, lora_run, flags, words):
    empty = tmp_path / "empty"
    empty.mkdir()
    config = json.dumps(to_dict(from_config_dict(small_config_dict())))
    (empty / "config.json").write_text(config)
    given = [flag.format(empty=empty, run=lora_run) for flag in flags]
    code, output = command(*["--kind=lora", f"--out={tmp_path / 'out'}", *given])
    assert code == 2, output
    assert "Traceback" not in output
    for word in words:
        assert word in output


PLUGIN = """
from pec_jax.rewards import Reward, RewardOptions, register

@register("warmth", RewardOptions)
def warmth(options, networks):
    return Reward("warmth", lambda variables, images, inputs: images.mean((-1, -2, -3)))
"""


def test_a_run_with_a_plugin_is_exported_with_it(tmp_path, lora_run):
    run, plugin = tmp_path / "run", tmp_path / "warmth.py"
    shutil.copytree(lora_run, run)
    stored = json.loads((run / "config.json").read_text())
    stored["rewards"]["warmth"] = {"weight": 0.5}
    write_json(run / "config.json", stored)
    plugin.write_text(PLUGIN)
    flags = [f"--workdir={run}", "--kind=lora", f"--out={tmp_path / 'out'}"]
    code, output = command(*flags)
    assert code == 2 and "unknown reward 'warmth'" in output and "with --plugin" in output, output
    code, output = command(*flags, f"--plugin={plugin}")
    assert code == 0, output
    assert "warmth" in (tmp_path / "out" / "README.md").read_text()


def test_help_and_missing_flags():
    code, output = command("--kind=lora")
    assert code == 2 and "--workdir, --out are missing" in output and "Traceback" not in output
    _, output = command("--help")
    for flag in ("workdir", "kind", "out", "use_ema", "dtype"):
        assert f"--{flag}" in output or f"--[no]{flag}" in output


class TestCard:
    """What the hub shows of an export."""

    def test_it_says_what_was_made_how_and_what_it_does(self, tmp_path, lora_run):
        exporting.run(lora_run, "lora", tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        data = card.data.to_dict()
        assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
        assert data["license"] == "apache-2.0" and "lora" in data["tags"]
        assert "# shapes, fine-tuned with Flow-GRPO" in card.text
        assert "2 iterations of 2 prompts with 4 images each, seed 0" in card.text
        numbers = json.loads((lora_run / "eval.json").read_text())
        assert f"| {numbers['base/quality/pickscore']:.4g} (" in card.text
        assert f"| {numbers['quality/pickscore']:.4g} (" in card.text
        assert '"learning_rate": 0.1' in card.text
        for name in CARD[1:]:
            assert f"]({name})" in card.text
        before = lora_run / "samples" / "step_000000.png"
        assert (tmp_path / "samples_base.png").read_bytes() == before.read_bytes()

    def test_its_code_runs(self, tmp_path, lora_run):
        exporting.run(lora_run, "lora", tmp_path)
        text = (tmp_path / "README.md").read_text()
        code = text.partition("```python\n")[2].partition("```")[0]
        code = code.replace("PATH OR HUB ID OF THIS REPOSITORY", str(tmp_path))
        scope = {}
        exec(code, scope)
        assert scope["image"].size == (64, 64)

    def test_a_hub_model_is_named_with_its_revision_and_a_directory_is_not(self):
        values = small_config_dict()
        values.model.path = "stabilityai/stable-diffusion-3.5-medium@abc"
        values.constraints.pec.weight = 0.5
        classes = ("StableDiffusion3Pipeline", "SD3Transformer2DModel")
        config, run = from_config_dict(values), Path("/none")
        text = model_card.model_card(run, config, "transformer", classes)
        data = ModelCard(text).data.to_dict()
        assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
        assert data["base_model_relation"] == "finetune" and data["license"] == "other"
        assert 'from_pretrained("stabilityai/stable-diffusion-3.5-medium", revision="abc"' in text
        assert "fine-tuned with PEC (dino, weight 0.5)" in text and "has not ended" in text
        values.model.path = "/home/someone/models/my-sd3"
        text = model_card.model_card(run, from_config_dict(values), "lora", classes)
        assert "someone" not in text and "my-sd3" in text
        assert "base_model" not in ModelCard(text).data.to_dict()
        assert "Started from" not in text
        values.trainable.init = "/home/someone/my-lora"
        text = model_card.model_card(run, from_config_dict(values), "lora", classes)
        assert "- Started from: my-lora" in text and "someone" not in text

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("/home/someone/flux1-dev.safetensors", 'from_single_file("PATH OF flux1-dev.saf'),
            ("/home/someone/finetuned/", 'from_pretrained("PATH OF finetuned")'),
            ("org/finetuned@abc", 'from_pretrained("org/finetuned", revision="abc")'),
        ],
    )
    def test_a_transformer_that_was_not_the_pipelines_own(self, name, call):
        values = small_config_dict()
        values.model.path = "black-forest-labs/FLUX.1-dev@abc"
        values.model.transformer = name
        classes = ("FluxPipeline", "FluxTransformer2DModel")
        text = model_card.model_card(Path("/none"), from_config_dict(values), "lora", classes)
        assert f"transformer = FluxTransformer2DModel.{call}" in text
        assert "import FluxPipeline, FluxTransformer2DModel" in text
        assert ', revision="abc", transformer=transformer)' in text and "someone" not in text
