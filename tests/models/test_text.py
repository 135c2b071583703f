"""How prompts are cut into tokens and batches, with a word-counting tokenizer."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.models import clip, t5
from pec_jax.models.text import TextStack, TextTower
from pec_jax.types import Conditioning

EOS, PAD, VOCAB = 1, 0, 40


class WordTokenizer:
    """One id a word, then an end token; called as a Hugging Face tokenizer is."""

    def __call__(self, prompts, padding=None, max_length=None, truncation=False, **options):
        rows = [[2 + len(word) % (VOCAB - 2) for word in p.split()] + [EOS] for p in prompts]
        if truncation:
            rows = [[*row[: max_length - 1], EOS] if len(row) > max_length else row for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding == "max_length":
            rows, masks = (
                [row + [PAD] * (max_length - len(row)) for row in part] for part in (rows, masks)
            )
        return {"input_ids": rows, "attention_mask": masks}


def combine(outputs, masks):
    """Tokens of T5, and the end-of-text features of both CLIP towers."""
    pooled = jnp.concatenate([outputs[name].pooled for name in ("clip", "clip_2")], axis=-1)
    return Conditioning(outputs["t5"], pooled)


@pytest.fixture(scope="module")
def stack() -> TextStack:
    tower = clip.CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=6,
        eos_token_id=EOS,
    )
    encoder = t5.T5Config(vocab_size=VOCAB, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    modules = {
        "clip": clip.CLIPTextModel(tower),
        "clip_2": clip.CLIPTextModel(dataclasses.replace(tower, hidden_act="gelu")),
        "t5": t5.T5Encoder(encoder),
    }
    ids = np.zeros((1, 2), np.int32)
    variables = {
        name: nn.unbox(module.init(jax.random.key(i), ids))
        for i, (name, module) in enumerate(modules.items())
    }
    lengths = {"clip": 6, "clip_2": 6, "t5": 9}
    towers = {
        name: TextTower(module, variables[name], WordTokenizer(), lengths[name])
        for name, module in modules.items()
    }
    return TextStack(towers, combine, batch_size=4)


class Masked(nn.Module):
    """The mean of the embeddings that the mask lets through, beside each of them."""

    @nn.compact
    def __call__(self, ids, mask):
        x = nn.Embed(VOCAB, 5)(ids)
        mean = jnp.where(mask[..., None], x, 0.0).sum(1) / mask.sum(1, keepdims=True)
        return x + mean[:, None]


def test_a_masked_tower_takes_the_mask_and_the_conditioning_may_carry_it():
    module, ids = Masked(), np.zeros((1, 2), np.int32)
    variables = module.init(jax.random.key(0), ids, ids == 0)
    tower = TextTower(module, variables, WordTokenizer(), 6, masked=True)
    stack = TextStack(
        {"words": tower}, lambda out, masks: Conditioning(out["words"], mask=masks["words"])
    )
    prompts = ["one three", "a b c d e f g", "one three"]
    with pytest.warns(UserWarning, match="cut off"):
        found = stack.encode(prompts)
    assert found.pooled is None
    np.testing.assert_array_equal(found.mask.sum(1), [3, 6, 3])  # words and the end token
    assert found.mask.dtype == bool and found.mask[0, :3].all()
    # Computed from the three tokens alone, without any padding.
    ids = np.asarray(WordTokenizer()(prompts[:1])["input_ids"])
    alone = module.apply(variables, ids, np.ones_like(ids, bool))
    np.testing.assert_allclose(found.tokens[0, :3], alone[0], atol=1e-6)


def test_result_does_not_depend_on_the_batch(stack):
    prompts = ["x" * (i + 1) + " y" * (i % 4) for i in range(11)]  # not a multiple of 4
    together = stack.encode(prompts)
    assert together.tokens.shape[0] == together.pooled.shape[0] == 11
    for i, prompt in enumerate(prompts):
        alone = stack.encode([prompt])
        np.testing.assert_allclose(alone.tokens[0], together.tokens[i], atol=1e-5)
        np.testing.assert_allclose(alone.pooled[0], together.pooled[i], atol=1e-5)


def test_prompts_that_fit_exactly_do_not_warn(stack, recwarn):
    stack.tokenize(["a b c d e"])  # five words and the end token: all six places
    assert not recwarn.list


def test_a_prompt_too_long_for_one_encoder_warns_once(stack):
    with pytest.warns(UserWarning) as caught:
        ids = stack.tokenize(["a b c d e f", "a b c d e f", "a"])
    message = str(caught[0].message)
    assert len(caught) == 1
    assert "1 of 2 prompts" in message and "'a b c d e f'" in message and "clip 6" in message
    assert ids["clip"].ids.shape == (3, 6) and ids["t5"].ids.shape == (3, 9)
    assert ids["t5"].ids[0, 6] == EOS  # T5 had room for it
    assert ids["t5"].mask[0].sum() == 7 and ids["clip"].mask[0].sum() == 6


def test_no_prompts_is_an_error(stack):
    with pytest.raises(ValueError, match="no prompts"):
        stack.encode([])
