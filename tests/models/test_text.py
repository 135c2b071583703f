"""The conditioning maths, and how prompts are cut into batches, with a word-counting tokenizer."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from pec_jax.models import clip, t5
from pec_jax.models.text import TextStack, TextTower, flux_conditioning, join, sd3_conditioning

EOS, PAD, VOCAB = 1, 0, 40


class WordTokenizer:
    """One id a word, then an end token; called as a Hugging Face tokenizer is."""

    def __call__(self, prompts, padding=None, max_length=None, truncation=False, verbose=True):
        rows = [[2 + len(word) % (VOCAB - 2) for word in p.split()] + [EOS] for p in prompts]
        if truncation:
            rows = [[*row[: max_length - 1], EOS] if len(row) > max_length else row for row in rows]
        if padding == "max_length":
            rows = [row + [PAD] * (max_length - len(row)) for row in rows]
        return {"input_ids": rows}


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
    return TextStack(towers, sd3_conditioning(9, 40), batch_size=4)


def output(stack: TextStack, name: str, ids):
    tower = stack.towers[name]
    return tower.module.apply(tower.variables, ids[name])


def test_join_puts_clip_before_t5_and_fills_with_zeros():
    a, b, c = (
        np.full((2, length, width), v)
        for length, width, v in [(3, 4, 1.0), (3, 5, 2.0), (2, 12, 3.0)]
    )
    tokens = np.asarray(join(a, b, c))
    assert tokens.shape == (2, 5, 12)
    np.testing.assert_array_equal(tokens[0, 0], [1] * 4 + [2] * 5 + [0] * 3)
    assert (tokens[:, 3:] == 3).all()


def test_join_needs_room_for_both_towers():
    a = np.zeros((1, 3, 8))
    with pytest.raises(ValueError, match=r"8 \+ 8 wide, more than T5's 12"):
        join(a, a, np.zeros((1, 2, 12)))


def test_each_tower_stands_where_it_should(stack):
    prompts = ["one three", "a fairly longish prompt"]
    ids = stack.tokenize(prompts)
    out, out_2 = output(stack, "clip", ids), output(stack, "clip_2", ids)
    conditioning = stack.encode(prompts)
    assert conditioning.tokens.shape == (2, 15, 40)
    np.testing.assert_allclose(conditioning.tokens[:, :6, :16], out.penultimate, atol=1e-5)
    np.testing.assert_allclose(conditioning.tokens[:, :6, 16:32], out_2.penultimate, atol=1e-5)
    assert not conditioning.tokens[:, :6, 32:].any()
    encoded = output(stack, "t5", ids)
    np.testing.assert_allclose(conditioning.tokens[:, 6:], encoded, atol=1e-5)
    np.testing.assert_allclose(conditioning.pooled[:, :8], out.text_embeds, atol=1e-5)
    np.testing.assert_allclose(conditioning.pooled[:, 8:], out_2.text_embeds, atol=1e-5)


def test_without_t5_zeros_stand_in_its_place(stack):
    towers = {name: stack.towers[name] for name in ("clip", "clip_2")}
    found = TextStack(towers, stack.combine).encode(["one three"])
    whole = stack.encode(["one three"])
    np.testing.assert_allclose(found.tokens[:, :6], whole.tokens[:, :6], atol=1e-5)
    assert found.tokens.shape == whole.tokens.shape and not found.tokens[:, 6:].any()


def test_flux_takes_t5s_tokens_and_clips_end_of_text(stack):
    towers = {name: stack.towers[name] for name in ("clip", "t5")}
    flux = TextStack(towers, flux_conditioning)
    found, ids = flux.encode(["one three"]), flux.tokenize(["one three"])
    np.testing.assert_allclose(found.tokens, output(flux, "t5", ids), atol=1e-5)
    np.testing.assert_allclose(found.pooled, output(flux, "clip", ids).pooled, atol=1e-5)


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
    assert ids["clip"].shape == (3, 6) and ids["t5"].shape == (3, 9)
    assert ids["t5"][0, 6] == EOS  # T5 had room for it


def test_no_prompts_is_an_error(stack):
    with pytest.raises(ValueError, match="no prompts"):
        stack.encode([])
