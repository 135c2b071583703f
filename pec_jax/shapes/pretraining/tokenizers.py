"""Tokenizers of the shapes pipeline: a CLIP byte-pair encoding and a T5 unigram model.

Both are trained on the captions of the shapes world, so that each caption word is one token, and
both take any other text: CLIP falls back to bytes, T5 to single characters and `<unk>`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_LENGTH = 12  # 10 words of the longest caption, begin and end tokens
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_MARK = "\u2581"  # SentencePiece writes the space before a word so


def byte_alphabet() -> list[str]:
    """One printable character per byte, in the order of byte-level BPE vocabularies.

    Printable Latin-1 bytes stand for themselves; the others are shifted above 255.
    Source: Radford et al. 2019 (GPT-2), section 2.2.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(shifted))]


def train_merges(captions: Sequence[str]) -> list[tuple[str, str]]:
    """Learns byte-pair merges until every word of the captions is a single token.

    Args:
        captions: lower-case ASCII texts, words separated by spaces.

    Returns:
        The merges, most frequent pair first; ties go to the pair that sorts first.

    Source: Sennrich et al. 2016, algorithm 1.
    """
    counts = Counter(word for caption in captions for word in caption.split())
    words = {word: (*word[:-1], word[-1] + "</w>") for word in counts}
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in words.values()):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merged(symbols, best) for word, symbols in words.items()}
    return merges


def _merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def write_clip_tokenizer(directory: Path, captions: Sequence[str], pad_token: str) -> None:
    """Trains a CLIP tokenizer on the captions and writes it with all files CLIP users expect.

    Args:
        directory: created if missing.
        captions: training texts.
        pad_token: `<|endoftext|>`, or `!` as in the second tokenizer of SD3.
    """
    from transformers import CLIPTokenizer

    merges: Any = train_merges(captions)  # pairs, as the tokenizer wants them; declared as text
    symbols = byte_alphabet()
    symbols += [s + "</w>" for s in symbols]
    vocab: dict[str, int] = {}
    for symbol in [*symbols, *("".join(pair) for pair in merges), BEGIN, END]:
        vocab.setdefault(symbol, len(vocab))
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=MAX_LENGTH
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    (directory / "vocab.json").write_text(
        json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def unigram_pieces(captions: Sequence[str]) -> list[tuple[str, float]]:
    """The unigram vocabulary whose best segmentation has one piece per caption word.

    log p(word) = log(count / total), the maximum-likelihood unigram model under that segmentation;
    characters share the probability of one more word, so that any word can be spelled.

    Args:
        captions: lower-case ASCII texts, words separated by spaces.

    Returns:
        (piece, log-probability), words by falling frequency, then the word mark and characters.
    """
    counts = Counter(word for caption in captions for word in caption.split())
    total = sum(counts.values()) + 1
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = [(WORD_MARK + word, math.log(counts[word] / total)) for word in ranked]
    known = {piece for piece, _ in pieces}
    characters = [WORD_MARK, *(chr(c) for c in range(33, 127))]
    floor = -math.log(total * len(characters))
    return pieces + [(c, floor) for c in characters if c not in known]


def write_t5_tokenizer(directory: Path, captions: Sequence[str]) -> None:
    """Fits a SentencePiece unigram model to the captions and writes it as a T5 tokenizer.

    All printable ASCII characters are in the vocabulary, so other English text is spelled out.
    `<extra_id_0>` is the only sentinel; the text encoder's training uses it as its mask.

    Source: Kudo 2018 (unigram language model); Raffel et al. 2020 (T5 special tokens).
    """
    import sentencepiece.sentencepiece_model_pb2
    from transformers import T5Tokenizer

    messages: Any = sentencepiece.sentencepiece_model_pb2  # classes made when it is imported
    kinds = messages.ModelProto.SentencePiece
    control = [("<pad>", kinds.CONTROL), ("</s>", kinds.CONTROL), ("<unk>", kinds.UNKNOWN)]
    vocab = [(piece, 0.0) for piece, _ in control] + unigram_pieces(captions)
    model = messages.ModelProto()
    model.trainer_spec.model_type = messages.TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = len(vocab)
    model.trainer_spec.pad_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 2, -1
    model.normalizer_spec.name = "identity"
    for piece, score in vocab:
        model.pieces.add(piece=piece, score=score, type=dict(control).get(piece, kinds.NORMAL))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spiece.model").write_bytes(model.SerializeToString())
    vocab.append(("<extra_id_0>", 0.0))
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=1, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(directory)


def token_ids(tokenizer, captions: Sequence[str]):
    """Pads and truncates to MAX_LENGTH: texts -> int32 array [N, MAX_LENGTH]."""
    import numpy as np

    encoded = tokenizer(
        list(captions), padding="max_length", max_length=MAX_LENGTH, truncation=True
    )
    return np.asarray(encoded["input_ids"], np.int32)
