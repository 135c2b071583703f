"""BLIP against transformers, and ImageReward's names for the same tensors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from pec_jax.models import blip
from pec_jax.weights import layouts
from pec_jax.weights.convert import abstract_variables, count_parameters, from_torch
from pec_jax.weights.model_files import open_model
from pec_jax.weights.tensors import write_tensors
from tests.models import oracles

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "is_decoder": True,  # else transformers builds no attention to the image
}
IDS = np.array([[3, 7, 9, 4, 0, 0], [3, 5, 4, 0, 0, 0], [3, 8, 8, 8, 6, 4]], np.int32)


def make(vision: dict, text: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BlipConfig(
        vision_config={**VISION, **vision}, text_config={**TEXT, **text}, image_text_hidden_size=16
    )
    return oracles.randomise(transformers.BlipForImageTextRetrieval(config))


def load(directory, values, dtype=jnp.float32):
    module = blip.BlipModel(blip.BlipConfig.from_dict(values), dtype=dtype)
    side = module.config.vision.image_size
    example = (IDS[:1], IDS[:1], np.zeros((1, side, side, 3), np.float32))
    tensors = layouts.blip(open_model(directory))
    boxes = abstract_variables(module, *example)
    ignored = (*blip.IGNORED_TENSORS, r"mlp\..*")
    return module, from_torch(tensors, boxes, ignore=ignored, dtype=dtype)


def theirs(model, images) -> torch.Tensor:
    ids = torch.tensor(IDS.astype(np.int64))
    with torch.no_grad():
        out = model(ids, oracles.to_torch(images).to(model.dtype), attention_mask=(ids > 0).long())
        return out.question_embeds[:, 0].float()


@pytest.mark.parametrize(
    "vision, text",
    [
        ({}, {}),
        ({"num_attention_heads": 2, "hidden_act": "quick_gelu"}, {"num_attention_heads": 2}),
        ({"image_size": 34, "patch_size": 5}, {"num_hidden_layers": 3, "layer_norm_eps": 1e-5}),
        ({"num_hidden_layers": 1}, {"hidden_act": "gelu_new", "intermediate_size": 20}),
    ],
)
def test_the_first_token_equals_transformers(tmp_path, vision, text):
    model = make(vision, text)
    module, variables = load(tmp_path, oracles.save(model, tmp_path))
    side = module.config.vision.image_size
    images = oracles.pixels(3, side, side, 3)
    ours = jax.jit(module.apply)(variables, IDS, IDS > 0, images)
    assert oracles.relative_error(ours, theirs(model, images)) < 1e-5
    seen = jax.jit(lambda v, x: module.apply(v, x, method="get_image_features"))(variables, images)
    with torch.no_grad():
        tokens = model.vision_model(oracles.to_torch(images)).last_hidden_state
    assert oracles.relative_error(seen, tokens[:, 0]) < 1e-5
    unused = ("vision_proj", "text_proj", "itm_head")
    kept = [p for n, p in model.named_parameters() if not n.startswith(unused)]
    assert count_parameters(variables) == sum(p.numel() for p in kept)


def test_bf16_is_as_near_as_torchs(tmp_path):
    model = make({}, {})
    values = oracles.save(model, tmp_path)
    images = oracles.pixels(3, 32, 32, 3)
    exact = theirs(model, images).numpy()
    module, variables = load(tmp_path, values, jnp.bfloat16)
    ours = np.asarray(jax.jit(module.apply)(variables, IDS, IDS > 0, images), np.float32)
    half = theirs(model.bfloat16(), images).numpy()
    assert np.abs(ours - exact).mean() < 2 * np.abs(half - exact).mean()


def test_padding_changes_nothing(tmp_path):
    model = make({}, {})
    module, variables = load(tmp_path, oracles.save(model, tmp_path))
    images = oracles.pixels(1, 32, 32, 3)
    short = module.apply(variables, IDS[:1, :4], IDS[:1, :4] > 0, images)
    other = np.where(IDS[:1] > 0, IDS[:1], 11)  # behind the mask
    np.testing.assert_allclose(
        module.apply(variables, other, IDS[:1] > 0, images), short, rtol=1e-5, atol=1e-5
    )


def as_image_reward(name: str) -> str:
    """What ImageReward calls a tensor of transformers' BLIP, read off its source."""
    inside = "vision_model.embeddings"
    name = name.replace(f"{inside}.class_embedding", "visual_encoder.cls_token")
    name = name.replace(f"{inside}.position_embedding", "visual_encoder.pos_embed")
    name = name.replace(f"{inside}.patch_embedding", "visual_encoder.patch_embed.proj")
    name = name.replace("vision_model.post_layernorm", "visual_encoder.norm")
    if name.startswith("vision_model.encoder.layers"):
        name = name.replace("vision_model.encoder.layers", "visual_encoder.blocks")
        name = name.replace("layer_norm", "norm").replace("self_attn.projection", "attn.proj")
        name = name.replace("self_attn.qkv", "attn.qkv")
    return f"blip.{name}"


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_image_rewards_names_hold_the_same_network(tmp_path, prefix):
    model = make({}, {})
    values = oracles.save(model, tmp_path / "theirs")
    plain = open_model(tmp_path / "theirs")
    renamed = {prefix + as_image_reward(n): plain[n] for n in plain if not n.startswith("itm_head")}
    renamed[f"{prefix}mlp.layers.0.weight"] = np.zeros((1, 32), np.float32)
    write_tensors(tmp_path / "ours", renamed)
    (_, first), (_, second) = (load(tmp_path / name, values) for name in ("theirs", "ours"))
    jax.tree.map(np.testing.assert_array_equal, first, second)
