"""Both aesthetic predictors against transformers' encoders and their heads in torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pec_jax.config import ConfigError
from pec_jax.config.registry import REWARDS
from pec_jax.perception.networks import Networks
from pec_jax.weights.tensors import WeightsError
from tests.models import oracles
from tests.perception.test_heads import stack

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 40,
    "patch_size": 14,
}
SIZE = {"height": 40, "width": 40}


def siglip(root):
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER))
    processor = SiglipImageProcessorPil(size=SIZE)
    return model, processor, lambda pixels: model(pixels).pooler_output


def clip(root):
    text = {k: v for k, v in TOWER.items() if k not in ("image_size", "patch_size")}
    text |= {"vocab_size": 20, "max_position_embeddings": 5, "eos_token_id": 19}
    config = transformers.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=24)
    model = transformers.CLIPModel(config)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SIZE)
    return model, processor, lambda pixels: model.get_image_features(pixels).pooler_output


@pytest.mark.parametrize(
    "name, make, width, prefix",
    [("aesthetic_v2_5", siglip, 32, "scoring_head"), ("aesthetic_laion", clip, 24, "layers")],
)
@pytest.mark.parametrize("size", [(40, 40), (64, 96)])
def test_the_score_is_the_heads(tmp_path, name, make, width, prefix, size):
    torch.manual_seed(0)
    model, processor, features = make(tmp_path)
    oracles.randomise(model).save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    head = stack(width, 16, 8, 4, 1)
    torch.save({f"{prefix}.{n}": p for n, p in head.state_dict().items()}, tmp_path / "head.pth")

    networks = Networks(own=tmp_path, locate=lambda model: tmp_path / model)
    options = REWARDS[name].options(model="encoder", head=str(tmp_path / "head.pth"))
    reward = REWARDS[name].make(options, networks)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 2, *size, 3), dtype=np.uint8)
    variables = tuple(networks.variables[key] for key in reward.network)
    images = jnp.asarray(pictures, jnp.float32) / 255
    found = jax.jit(reward.score)(variables, images, {})

    pixels = np.stack(processor(list(pictures.reshape(-1, *size, 3)))["pixel_values"])
    with torch.no_grad():
        unit = torch.nn.functional.normalize(features(torch.tensor(pixels)), dim=-1)
        expected = head(unit)[:, 0].numpy().reshape(2, 2)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_head_must_be_given_and_fit(tmp_path):
    model, processor, _ = siglip(tmp_path)
    model.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    networks = Networks(own=tmp_path, locate=lambda model: tmp_path / model)
    definition = REWARDS["aesthetic_v2_5"]
    with pytest.raises(ConfigError, match=r"aesthetic_v2_5\.head is empty"):
        definition.make(definition.options(model="encoder"), networks)
    head = stack(20, 4, 1)
    torch.save({f"layers.{n}": p for n, p in head.state_dict().items()}, tmp_path / "head.pth")
    with pytest.raises(WeightsError, match="a head of 20 features, but the encoder gives 32"):
        definition.make(
            definition.options(model="encoder", head=str(tmp_path / "head.pth")), networks
        )
