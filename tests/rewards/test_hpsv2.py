"""HPSv2 against transformers' CLIP, from open_clip's names, at sizes that are not square."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.perception import published
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import CLIP_MEAN, CLIP_STD
from pec_jax.rewards import hpsv2
from pec_jax.shapes.pretraining import tokenizers
from tests.models import oracles
from tests.weights.test_layouts import to_open_clip

PROMPTS = ["a red  cat", "Two &amp;amp; a blue house"]
SIDE = 28


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A tiny HPSv2 in its published form, and the same network in transformers."""
    root = tmp_path_factory.mktemp("hps")
    tokenizers.write_clip_tokenizer(root / "tokenizer", PROMPTS, tokenizers.END)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "tokenizer")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizers.MAX_LENGTH,
        "hidden_act": "gelu",
        "eos_token_id": len(tokenizer) - 1,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 7,
        "hidden_act": "gelu",
    }
    config = {"model_type": "clip", "projection_dim": 20}
    config |= {"text_config": text, "vision_config": vision}
    values = {k: v for k, v in config.items() if k != "model_type"}
    torch.manual_seed(0)
    model = oracles.randomise(transformers.CLIPModel(transformers.CLIPConfig(**values)))
    state = to_open_clip({name: p.detach().numpy() for name, p in model.named_parameters()})
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    torch.save({"epoch": 1, "state_dict": tensors}, root / "HPS_v2.1_compressed.pt")
    files = {
        "config.json": config,
        "preprocessor_config.json": {
            "size": {"longest_edge": SIDE},
            "do_pad": True,
            "do_center_crop": False,
        },
    }
    return root, model, tokenizer, files


def theirs(model, tokenizer, picture: np.ndarray, prompt: str) -> float:
    """HPSv2's own steps: the longest side resized, black bars, mean and std, cosine."""
    image = Image.fromarray(picture)
    scale = SIDE / max(image.size)
    size = [round(side * scale) for side in image.size]
    square = Image.new("RGB", (SIDE, SIDE))
    place = tuple((SIDE - side) // 2 for side in size)
    square.paste(image.resize(size, Image.BICUBIC), place)
    pixels = (np.asarray(square, np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    ids = tokenizer([hpsv2.cleaned(prompt)], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        image_features = model.get_image_features(
            oracles.to_torch(pixels[None].astype(np.float32))
        ).pooler_output
        text_features = model.get_text_features(ids["input_ids"]).pooler_output
    return torch.nn.functional.cosine_similarity(image_features, text_features).item()


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (40, 61), (60, 33)])
def test_the_score_is_hpsv2s(hps, monkeypatch, size):
    root, model, tokenizer, files = hps
    monkeypatch.setattr(hpsv2, "HPSV2", files)
    networks = Networks(own=root / "encoders", locate=lambda name: root / name)
    options = REWARDS["hpsv2"].options(model="HPS_v2.1_compressed.pt")
    reward = REWARDS["hpsv2"].make(options, networks)
    inputs = reward.prepare(networks.variables[reward.network], [Prompt(p) for p in PROMPTS])
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, *size, 3), dtype=np.uint8)
    images = jnp.asarray(pictures, jnp.float32) / 255
    found = jax.jit(reward.score)(networks.variables[reward.network], images, inputs)
    expected = [
        [theirs(model, tokenizer, picture, prompt) for picture in row]
        for row, prompt in zip(pictures, PROMPTS)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_texts_are_cleaned_as_there():
    assert hpsv2.cleaned(" a\n cat &amp;amp; dog &lt;3 ") == "a cat & dog <3"


def test_the_published_network_is_vit_h_14():
    config = published.HPSV2["config.json"]
    assert config["vision_config"]["hidden_size"] == 1280 and config["projection_dim"] == 1024
