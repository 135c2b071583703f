"""ImageReward against transformers' BLIP and its head in torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import BertTokenizerFast

from pec_jax.config.registry import ENCODERS, REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import CLIP_MEAN, CLIP_STD
from pec_jax.rewards import imagereward
from tests.models import oracles
from tests.models.test_blip import TEXT, VISION, as_image_reward

PROMPTS = ["a red cat", "two blue houses in the snow, far away"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + "a red cat two blue houses in the".split()  # noqa: RUF005, SIM905


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny ImageReward.pt as it is published, and the network of transformers with its head."""
    root = tmp_path_factory.mktemp("imagereward")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(vocab_file=str(root / "vocab.txt"), model_max_length=512)
    tokenizer.save_pretrained(root / "bert")
    text = {**TEXT, "max_position_embeddings": 40, "vocab_size": len(WORDS)}
    torch.manual_seed(0)
    config = transformers.BlipConfig(vision_config=VISION, text_config=text)
    model = oracles.randomise(transformers.BlipForImageTextRetrieval(config))
    widths = (32, 24, 12, 8, 4, 1)
    layers: list[torch.nn.Module] = []
    for i in range(5):
        layers.append(torch.nn.Linear(widths[i], widths[i + 1]))
        if i < 3:
            layers.append(torch.nn.Dropout(0.2))
    head = torch.nn.Sequential(*layers).eval()  # indices 0, 2, 4, 6, 7
    state = {as_image_reward(n): p.detach() for n, p in model.named_parameters()}
    state = {n: p for n, p in state.items() if "itm_head" not in n}
    state |= {f"mlp.layers.{n}": p for n, p in head.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, root / "ImageReward.pt")
    files = {
        "config.json": {"model_type": "blip", "vision_config": VISION, "text_config": text},
        "preprocessor_config.json": {
            "size": {"shortest_edge": 32},
            "do_center_crop": True,
            "crop_size": 32,
        },
    }
    return root, model, (tokenizer, head), files


def theirs(model, judge, picture: np.ndarray, prompt: str) -> float:
    tokenizer, head = judge
    image = Image.fromarray(picture)
    short = min(image.size)
    width, height = (int(32 * side / short) for side in image.size)
    left, top = (width - 32) // 2, (height - 32) // 2
    image = image.resize((width, height), Image.BICUBIC).crop((left, top, left + 32, top + 32))
    pixels = ((np.asarray(image, np.float32) / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32)
    tokens = tokenizer([prompt], padding="max_length", max_length=35, return_tensors="pt")
    with torch.no_grad():
        h = model(
            tokens["input_ids"],
            oracles.to_torch(pixels[None]),
            attention_mask=tokens["attention_mask"],
        ).question_embeds[:, 0]
        return ((head(h) - 0.16717362830052426) / 1.0333394966054072).item()


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (70, 40)])
def test_the_score_is_imagerewards(published, monkeypatch, size):
    root, model, judge, files = published
    monkeypatch.setattr(imagereward, "IMAGE_REWARD", files)
    networks = Networks(own=root, locate=lambda name: root / name)
    options = REWARDS["imagereward"].options(model="ImageReward.pt", tokenizer="bert")
    reward = REWARDS["imagereward"].make(options, networks)
    inputs = reward.prepare({}, [Prompt(text) for text in PROMPTS])
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, *size, 3), dtype=np.uint8)
    images = jnp.asarray(pictures, jnp.float32) / 255
    variables = tuple(networks.variables[key] for key in reward.network)
    found = jax.jit(reward.score)(variables, images, inputs)
    expected = [
        [theirs(model, judge, picture, prompt) for picture in row]
        for row, prompt in zip(pictures, PROMPTS)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    planned = reward.input_shapes(2)
    assert [(a.shape, a.dtype) for a in planned] == [(a.shape, a.dtype) for a in inputs]


def test_its_space_shares_the_network(published, monkeypatch):
    root, model, _, files = published
    monkeypatch.setattr(imagereward, "IMAGE_REWARD", files)
    monkeypatch.setattr("pec_jax.perception.encoders.imagereward.IMAGE_REWARD", files)
    networks = Networks(own=root, locate=lambda name: root / name)
    options = REWARDS["imagereward"].options(model="ImageReward.pt", tokenizer="bert")
    reward = REWARDS["imagereward"].make(options, networks)
    encoder = ENCODERS["imagereward"].make(
        ENCODERS["imagereward"].options(model="ImageReward.pt"), networks
    )
    assert encoder.network == reward.network[0] and len(networks.variables) == 2
    images = np.random.default_rng(0).random((2, 32, 32, 3)).astype(np.float32)
    found = encoder.image_features(networks.variables[encoder.network], images)
    pixels = ((images - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).astype(np.float32)
    with torch.no_grad():
        tokens = model.vision_model(oracles.to_torch(pixels)).last_hidden_state
    assert oracles.relative_error(found, tokens[:, 0]) < 1e-5
