"""The T5 encoder against transformers, at its own tensor names."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from pec_jax.families.text import load_variables
from pec_jax.models import t5
from pec_jax.weights.tensors import write_tensors

SMALL = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 12,  # heads need not add up to d_model
    "d_ff": 56,
    "num_layers": 3,
    "num_heads": 2,
}


def build(directory, **changes):
    """A saved T5EncoderModel with random weights, our module and its loaded variables."""
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Norm scales off 1; the others keep T5's own start, which sets the logits' size.
            if "layer_norm" in name:
                p += 0.1 * torch.randn(p.shape)
    model.save_pretrained(directory)
    config = t5.T5Config.from_dict(json.loads((directory / "config.json").read_text()))
    module = t5.T5Encoder(config)
    ids = np.zeros((1, 2), np.int32)
    return model, module, load_variables(directory, module, ids, ignore=t5.IGNORED_TENSORS)


def random_ids(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, (3, length)).astype(np.int32)


@pytest.mark.parametrize(
    "changes, length",
    [
        ({"feed_forward_proj": "relu"}, 7),
        ({"feed_forward_proj": "gated-gelu", "num_heads": 3, "layer_norm_epsilon": 1e-3}, 14),
        ({"feed_forward_proj": "gated-silu", "num_layers": 1}, 1),
        ({"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}, 31),
    ],
)
def test_encoder_equals_transformers(tmp_path, changes, length):
    model, module, variables = build(tmp_path, **changes)
    ids = random_ids(length)
    ours = np.asarray(jax.jit(module.apply)(variables, ids))
    theirs = model(torch.tensor(ids, dtype=torch.long))[0].detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()

    count = sum(a.size for a in jax.tree.leaves(variables["params"]))
    assert count == sum(p.numel() for p in model.parameters())


def test_mask_hides_tokens(tmp_path):
    model, module, variables = build(tmp_path, feed_forward_proj="gated-gelu")
    ids = random_ids(9)
    mask = np.ones((3, 9), np.int32)
    mask[0, 4:] = 0
    mask[2, 7:] = 0
    ours = np.asarray(jax.jit(module.apply)(variables, ids, mask))
    theirs = model(torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask))[0]
    theirs = theirs.detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert np.abs(ours - np.asarray(jax.jit(module.apply)(variables, ids))).max() > 1e-3


def test_token_table_stored_twice_is_read_once(tmp_path):
    model, module, variables = build(tmp_path)
    state = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    assert "encoder.embed_tokens.weight" in state
    write_tensors(tmp_path / "twice", state)
    ids = np.zeros((1, 2), np.int32)
    again = load_variables(tmp_path / "twice", module, ids, ignore=t5.IGNORED_TENSORS)
    jax.tree.map(np.testing.assert_array_equal, variables, again)


@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 12), (6, 20)])
def test_buckets_equal_transformers(buckets, distance):
    positions = torch.arange(300)
    theirs = T5Attention._relative_position_bucket(
        positions[None] - positions[:, None], num_buckets=buckets, max_distance=distance
    )
    ours = t5.relative_position_buckets(300, buckets, distance)
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert ours.max() == buckets - 1


def test_bf16_stays_near_fp32(tmp_path):
    _, module, variables = build(tmp_path, feed_forward_proj="gated-gelu")
    ids = random_ids(7)
    half = jax.jit(t5.T5Encoder(module.config, dtype=jnp.bfloat16).apply)(variables, ids)
    assert half.dtype == jnp.bfloat16
    full = jax.jit(module.apply)(variables, ids)
    np.testing.assert_allclose(half.astype(np.float32), full, atol=0.15)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj = 'mish'"),
        ({"feed_forward_proj": "sparse-relu"}, "feed_forward_proj = 'sparse-relu'"),
        ({"model_type": "umt5"}, "model_type = 'umt5'"),
    ],
)
def test_config_names_what_it_cannot_compute(values, message):
    with pytest.raises(ValueError, match=message):
        t5.T5Config.from_dict({**SMALL, **values})
