"""alpha_pattern and rank_pattern: PEFT's rules, and what could take for ever."""

from __future__ import annotations

import time
from pathlib import Path

import peft
import pytest
from peft.utils.other import get_pattern_key

from pec_jax.weights.lora_scale import scales
from pec_jax.weights.lora_settings import Settings
from pec_jax.weights.tensors import WeightsError
from tests.weights import lora_oracles as oracles

MODULES = [
    f"{block}.{i}.{layer}"
    for block in ("transformer_blocks", "single_transformer_blocks")
    for i in (0, 1, 10)
    for layer in ("attn.to_q", "attn.to_out.0", "attn2.to_q", "ff.net.0.proj", "norm1.linear")
] + ["proj_out", "context_embedder"]
PATTERNS = [
    r".*\.attn\.to_q",
    r"to_(q|k|out\.0)",
    r"transformer_blocks\.\d+\.attn\.to_q",
    r"^transformer_blocks\.(0|10)\..*",
    r"transformer_blocks.1.attn.to_q",
    r"(?:single_)?transformer_blocks\.1.*",
    r"[a-z_]+\.\d{1,2}\.ff\.net\.0\.proj",
    r"ttn.to_q",  # half a name
    r"proj_out$",
    r".*to_q|.*linear",
    r"attn2?\.to_q",
    r"\w+\.[^1]\.attn\.to_out\.0",
    r"",
    r"embedder",
]


def settings(**values):
    return Settings(Path("x.safetensors"), {"r": 4, "lora_alpha": 8} | values)


@pytest.mark.parametrize("first", PATTERNS)
@pytest.mark.parametrize("second", [PATTERNS[0], PATTERNS[9]])
def test_the_first_pattern_that_matches_counts_as_in_peft(first, second):
    alphas = {second: 3.0, first: 5.0}
    found = scales(Path("x"), dict.fromkeys(MODULES, 4), settings(alpha_pattern=alphas), {})
    expected = {m: alphas.get(get_pattern_key(alphas, m), 8.0) / 4 for m in MODULES}
    assert found == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ranks_are_those_of_their_pattern(pattern):
    ranks = {m: 2 if get_pattern_key([pattern], m) == pattern else 4 for m in MODULES}
    stated = settings(rank_pattern={pattern: 2})
    assert scales(Path("x"), ranks, stated, {}) == {m: 8 / rank for m, rank in ranks.items()}
    ranks[MODULES[0]] = 6 - ranks[MODULES[0]]
    with pytest.raises(WeightsError, match=f"{MODULES[0]}' has rank"):
        scales(Path("x"), ranks, stated, {})


@pytest.mark.filterwarnings("ignore")
def test_regular_expressions_of_a_trained_adapter(tmp_path):
    directory = oracles.write(tmp_path / "sd3", "sd3")
    base = oracles.numbers(oracles.model(directory, "sd3"))
    model = oracles.model(directory, "sd3")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k", "to_v"],
        rank_pattern={r".*\.attn\.to_k": 2, r"transformer_blocks\.(0|1)\.attn\.to_q": 3},
        alpha_pattern={r".*\.attn\.to_[kv]": 6, r"^transformer_blocks\.\d+\.attn\.to_q": 5},
    )
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "lora")
    oracles.assert_merged(
        oracles.ours(directory, tmp_path / "lora"),
        oracles.of_peft(directory, "sd3", tmp_path / "lora"),
        base,
    )


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        (r"(a+)+$", "could take for ever"),
        (r"(\w|\w)*x", "could take for ever"),
        (r"(?=.*a).*b", "could take for ever"),
        (r"(.)\1", "could take for ever"),
        ("a?" * 40 + "a" * 40, "could take for ever"),
        (".*" * 6 + "x", "could take for ever"),
        (r"(\w|\w)" * 30, "could take for ever"),
        ("x" * 1000, "could take for ever"),
        ("(" * 400, "no regular expression"),
        ("to_(q", "no regular expression"),
    ],
)
def test_patterns_that_are_refused(key, pattern, word):
    start = time.monotonic()
    with pytest.raises(WeightsError, match=rf"x\.safetensors: {key} .*{word}"):
        scales(Path("x"), {"a" * 60: 4}, settings(**{key: {pattern: 4}}), {})
    assert time.monotonic() - start < 2


def test_many_patterns_are_refused():
    table = {f"{i}.*": 4 for i in range(10_001)}
    with pytest.raises(WeightsError, match="could take for ever"):
        scales(Path("x"), {"a": 4}, settings(alpha_pattern=table), {})


def test_the_worst_that_is_taken_ends_soon():
    start = time.monotonic()
    stated = settings(alpha_pattern={r".*_.*_.*x": 1, r"\w+\w+\w+(a|b|c|d)": 2})
    scales(Path("x"), {"_" * 64: 4}, stated, {})
    assert time.monotonic() - start < 5
