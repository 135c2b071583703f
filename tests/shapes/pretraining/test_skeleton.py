"""The empty pipeline: every config is understood by diffusers, transformers and by our models."""

from __future__ import annotations

import json

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import AutoConfig, AutoImageProcessor, CLIPProcessor

from pec_jax.models.clip import CLIPConfig, CLIPTextConfig
from pec_jax.models.mmdit import MMDiTConfig
from pec_jax.models.t5 import T5Config
from pec_jax.models.vae import VAEConfig
from pec_jax.models.vision_kinds import read_vision_config
from pec_jax.shapes.pretraining import skeleton


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("skeleton")
    skeleton.build(out)
    return out


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("transformer", MMDiTConfig),
        ("vae", VAEConfig),
        ("text_encoder", CLIPTextConfig),
        ("text_encoder_2", CLIPTextConfig),
        ("text_encoder_3", T5Config),
        ("encoders/clip", CLIPConfig),
        ("encoders/pickscore", CLIPConfig),
        ("encoders/pickscore_taste", CLIPConfig),
        ("encoders/hps", CLIPConfig),
    ],
)
def test_our_models_read_every_config(directory, name, config):
    values = json.loads((directory / name / "config.json").read_text())
    assert isinstance(config.from_dict(values), config)


def test_our_vision_transformer_reads_its_config(directory):
    values = json.loads((directory / "encoders/dino/config.json").read_text())
    assert read_vision_config(values).width == values["hidden_size"]


def test_widths_fit_together(directory):
    def read(name):
        return json.loads((directory / name / "config.json").read_text())

    text = [read("text_encoder"), read("text_encoder_2")]
    transformer = read("transformer")
    assert sum(t["hidden_size"] for t in text) <= transformer["joint_attention_dim"]
    assert read("text_encoder_3")["d_model"] == transformer["joint_attention_dim"]
    assert sum(t["projection_dim"] for t in text) == transformer["pooled_projection_dim"]
    assert [t["hidden_act"] for t in text] == ["quick_gelu", "gelu"]
    vae = read("vae")
    assert vae["latent_channels"] == transformer["in_channels"]
    downscaling = 2 ** (len(vae["block_out_channels"]) - 1)
    assert vae["sample_size"] == downscaling * transformer["sample_size"]


@pytest.mark.parametrize("name", ["clip", "dino", "pickscore", "pickscore_taste", "hps"])
def test_transformers_reads_the_encoder_directories(directory, name):
    path = directory / "encoders" / name
    assert AutoConfig.from_pretrained(path).model_type == ("vit" if name == "dino" else "clip")
    assert AutoImageProcessor.from_pretrained(path).image_std[0] == 0.5
    if name != "dino":
        inputs = CLIPProcessor.from_pretrained(path)(text=["a red cat"])
        assert len(inputs["input_ids"][0]) == 5


def test_scheduler_and_index_are_those_of_diffusers(directory):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler")
    assert scheduler.config.shift == skeleton.SCHEDULER["shift"]
    index = json.loads((directory / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    for name, (library, _) in ((k, v) for k, v in index.items() if isinstance(v, list)):
        assert (library is None) or (directory / name).is_dir()


def test_the_evaluating_preference_model_is_another_network(directory):
    def vision(name):
        return json.loads((directory / "encoders" / name / "config.json").read_text())[
            "vision_config"
        ]

    assert vision("hps")["patch_size"] != vision("pickscore")["patch_size"]
    assert vision("hps")["hidden_size"] != vision("pickscore")["hidden_size"]


def test_prompts_are_written_one_a_line(directory):
    names = {path.stem for path in (directory / "prompts").iterdir()}
    assert names == {"train_open", "heldout_open", "tuning_open", "specified"}
    lines = (directory / "prompts" / "train_open.txt").read_text().splitlines()
    assert len(lines) == 96 and all(line == line.strip() != "" for line in lines)
