"""CLIP against transformers, at its own tensor names."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec

from pec_jax.families.text import load_variables
from pec_jax.models import clip
from pec_jax.weights.tensors import write_tensors

EOS = 49
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 14,
    "projection_dim": 24,
    "bos_token_id": 48,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 34,  # not a multiple of the patch: the rest is cut off
    "patch_size": 8,
    "projection_dim": 24,
}


def relative_error(ours, theirs: torch.Tensor) -> float:
    theirs = theirs.detach().numpy()
    assert np.shape(ours) == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def save(model: torch.nn.Module, directory) -> dict:
    """Moves every parameter off its symmetric start, saves; returns the stored config."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    model.eval().save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def token_ids(length: int, eos_at: int, vocab: int = EOS - 1) -> np.ndarray:
    """[3, length] ids with the end-of-text token once, then once more as padding."""
    ids = np.random.default_rng(0).integers(0, vocab, (3, length)).astype(np.int32)
    ids[:, eos_at], ids[:, -1] = EOS, EOS
    return ids


@pytest.mark.parametrize(
    "changes, length",
    [
        ({}, 11),
        ({"hidden_act": "gelu", "num_attention_heads": 4}, 14),
        ({"num_hidden_layers": 1, "layer_norm_eps": 1e-3}, 5),
        ({"eos_token_id": 2}, 9),  # the legacy id: pooled at the highest token
    ],
)
def test_text_model_equals_transformers(tmp_path, changes, length):
    config = transformers.CLIPTextConfig(**{**TEXT, **changes})
    model = transformers.CLIPTextModelWithProjection(config)
    module = clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(save(model, tmp_path)))
    ids = token_ids(length, eos_at=3)
    out = jax.jit(module.apply)(load_variables(tmp_path, module, ids), ids)

    theirs = model(torch.tensor(ids, dtype=torch.long), output_hidden_states=True)
    assert relative_error(out.penultimate, theirs.hidden_states[-2]) < 1e-5
    assert relative_error(out.last_hidden, theirs.last_hidden_state) < 1e-5
    assert relative_error(out.text_embeds, theirs.text_embeds) < 1e-5
    assert relative_error(out.pooled, theirs.last_hidden_state[:, 3]) < 1e-5


def test_text_model_without_projection(tmp_path):
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    config = clip.CLIPTextConfig.from_dict(save(model, tmp_path))
    # Published pipelines (FLUX.1) hold the prefix that transformers 5 leaves out when it saves.
    state = {f"text_model.{name}": p.detach().numpy() for name, p in model.named_parameters()}
    write_tensors(tmp_path, state)
    module = clip.CLIPTextModel(config, with_projection=False)
    ids = token_ids(7, eos_at=2)
    out = module.apply(load_variables(tmp_path, module, ids), ids)
    assert out.text_embeds is None
    theirs = model(torch.tensor(ids, dtype=torch.long)).pooler_output
    assert relative_error(out.pooled, theirs) < 1e-5


@pytest.mark.parametrize(
    "text, vision",
    [
        ({}, {}),
        ({"num_attention_heads": 4}, {"num_attention_heads": 4, "hidden_act": "gelu"}),
        ({"hidden_act": "gelu"}, {"image_size": 16, "num_hidden_layers": 3}),
        ({"eos_token_id": 2}, {"patch_size": 17, "layer_norm_eps": 1e-3}),
    ],
)
def test_whole_model_equals_transformers(tmp_path, text, vision):
    config = transformers.CLIPConfig(
        text_config={**TEXT, **text}, vision_config={**VISION, **vision}, projection_dim=20
    )
    model = transformers.CLIPModel(config)
    stored = save(model, tmp_path)
    module = clip.CLIPModel(clip.CLIPConfig.from_dict(stored))
    ids = token_ids(11, eos_at=5)
    side = config.vision_config.image_size
    pixels = np.random.default_rng(1).normal(size=(4, side, side, 3)).astype(np.float32)
    variables = load_variables(tmp_path, module, ids, pixels)
    text, image = jax.jit(module.apply)(variables, ids, pixels)

    torch_ids = torch.tensor(ids, dtype=torch.long)
    theirs = model(input_ids=torch_ids, pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2))
    logits = jnp.exp(variables["params"]["logit_scale"]) * (
        (image / jnp.linalg.norm(image, axis=-1, keepdims=True))
        @ (text / jnp.linalg.norm(text, axis=-1, keepdims=True)).T
    )
    assert relative_error(logits, theirs.logits_per_image) < 1e-5
    text_only = module.apply(variables, ids, method="get_text_features")
    image_only = module.apply(variables, pixels, method="get_image_features")
    np.testing.assert_allclose(text_only, text, atol=1e-5)
    np.testing.assert_allclose(image_only, image, atol=1e-5)

    count = sum(a.size for a in jax.tree.leaves(variables["params"]))
    assert count == sum(p.numel() for p in model.parameters())


def test_nested_config_gives_the_text_tower_its_projection():
    nested = {"model_type": "clip", "projection_dim": 20, "text_config": dict(TEXT)}
    assert clip.CLIPTextConfig.from_dict(nested).projection_dim == 20
    old = nested | {"text_config_dict": {"hidden_act": "gelu"}}
    assert clip.CLIPTextConfig.from_dict(old).hidden_act == "gelu"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"model_type": "siglip_text_model"}, "model_type = 'siglip_text_model'"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size = 30"),
    ],
)
def test_config_names_what_it_cannot_compute(values, message):
    with pytest.raises(ValueError, match=message):
        clip.CLIPTextConfig.from_dict({**TEXT, **values})


def test_too_many_tokens_are_an_error():
    text = clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(TEXT))
    with pytest.raises(ValueError, match="15 tokens, but CLIP has 14 positions"):
        jax.eval_shape(text.init, jax.random.key(0), np.zeros((1, 15), np.int32))


def test_bf16_of_both_towers_is_as_near_as_torchs(tmp_path):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
    model = transformers.CLIPModel(config)
    stored = save(model, tmp_path)
    ids = token_ids(11, eos_at=5)
    pixels = np.random.default_rng(1).normal(size=(4, 34, 34, 3)).astype(np.float32)
    module = clip.CLIPModel(clip.CLIPConfig.from_dict(stored), dtype=jnp.bfloat16)
    variables = load_variables(tmp_path, module, ids, pixels, dtype=jnp.bfloat16)
    ours = jax.jit(module.apply)(variables, ids, pixels)

    def features(model):
        images = torch.tensor(pixels).permute(0, 3, 1, 2).to(model.dtype)
        with torch.no_grad():
            text = model.get_text_features(torch.tensor(ids, dtype=torch.long)).pooler_output
            image = model.get_image_features(images).pooler_output
        return [a.float().numpy() for a in (text, image)]

    exact, half = features(model), features(model.bfloat16())
    for found, right, theirs in zip(ours, exact, half):
        error = np.abs(np.asarray(found, np.float32) - right).mean()
        assert error < 2 * np.abs(theirs - right).mean()


def test_bf16_stays_near_fp32():
    config = clip.CLIPTextConfig.from_dict(TEXT)
    ids = token_ids(11, eos_at=5)
    module = clip.CLIPTextModel(config)
    variables = nn.unbox(module.init(jax.random.key(0), ids))
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    full = jax.jit(module.apply)(variables, ids)
    half = jax.jit(clip.CLIPTextModel(config, dtype=jnp.bfloat16).apply)(variables, ids)
    assert half.last_hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.last_hidden.astype(np.float32), full.last_hidden, atol=0.1)


def test_kernels_name_their_axes():
    module = clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(TEXT))
    boxed = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 3), np.int32))
    specs = nn.get_partition_spec(boxed)["params"]["text_model"]["encoder.layers.0:3"]
    assert specs["self_attn.q_proj"]["kernel"] == PartitionSpec("layers", "embed", "heads")
    assert specs["mlp.fc2"]["kernel"] == PartitionSpec("layers", "mlp", "embed")
