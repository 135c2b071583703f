"""Tokenizers: every caption word is one token, and any other text is taken too."""

from __future__ import annotations

import pytest
import sentencepiece
from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import tokenizers


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    captions = shapes.all_captions()
    tokenizers.write_clip_tokenizer(root / "clip", captions, tokenizers.END)
    tokenizers.write_clip_tokenizer(root / "clip_2", captions, "!")
    tokenizers.write_t5_tokenizer(root / "t5", captions)
    return root


@pytest.mark.parametrize(
    ("name", "kind", "special"),
    [("clip", CLIPTokenizer, 2), ("clip_2", CLIPTokenizer, 2), ("t5", T5TokenizerFast, 1)],
)
def test_every_caption_word_is_one_token(directory, name, kind, special):
    tokenizer = kind.from_pretrained(directory / name)
    captions = shapes.all_captions()
    for caption, ids in zip(captions, tokenizer(captions)["input_ids"]):
        assert len(ids) == len(caption.split()) + special
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


@pytest.mark.parametrize("name", ["clip", "clip_2", "t5"])
def test_other_text_is_truncated_and_padded_to_the_model_length(directory, name):
    tokenizer = AutoTokenizer.from_pretrained(directory / name)
    assert tokenizer.model_max_length == tokenizers.MAX_LENGTH
    texts = ["", "Zebra crossing, 1998!", "日本 wörld", "a red circle " * 20]
    ids = tokenizers.token_ids(tokenizer, texts)
    assert ids.shape == (4, tokenizers.MAX_LENGTH)
    assert ids.min() >= 0
    assert ids.max() < len(tokenizer)


def test_slow_and_fast_t5_files_agree(directory):
    slow = sentencepiece.SentencePieceProcessor(model_file=str(directory / "t5" / "spiece.model"))
    fast = T5TokenizerFast.from_pretrained(directory / "t5")
    for text in ["a small red circle at the top", "Zebra"]:
        assert [*slow.encode(text), fast.eos_token_id] == fast(text)["input_ids"]


def test_second_clip_tokenizer_pads_with_an_exclamation_mark(directory):
    ids = tokenizers.token_ids(CLIPTokenizer.from_pretrained(directory / "clip_2"), [""])
    assert ids[0, 2:].tolist() == [0] * (tokenizers.MAX_LENGTH - 2)


def test_byte_alphabet_has_one_character_for_each_byte():
    alphabet = tokenizers.byte_alphabet()
    assert len(set(alphabet)) == 256
    assert alphabet[0] == "!"


def test_merges_build_each_word_out_of_earlier_symbols():
    merges = tokenizers.train_merges(["low lower", "low"])
    assert merges[0] == ("l", "o")
    known = set("lower") | {"w</w>", "r</w>"}
    for left, right in merges:
        assert {left, right} <= known
        known.add(left + right)
    assert {"low</w>", "lower</w>"} <= known
