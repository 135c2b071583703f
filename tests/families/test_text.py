"""The text stack, loaded from a pipeline directory, against diffusers."""

from __future__ import annotations

import json
import re
import reprlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from pec_jax.errors import FileError
from pec_jax.families.pipeline import load_text_stack
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.weights.tensors import WeightsError

CAPTIONS = ["a small red cat in the snow", "two large blue houses at the top", "a thing"]
T5_WIDTH = 80
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
}


def clip_tower(vocab: int, eos: int, **changes) -> CLIPTextModelWithProjection:
    config = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizers.MAX_LENGTH,
        "projection_dim": 24,
        "bos_token_id": vocab - 2,
        "eos_token_id": eos,
    }
    return CLIPTextModelWithProjection(CLIPTextConfig(**{**config, **changes}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A pipeline's text part: real tokenizers, small random encoders."""
    root = tmp_path_factory.mktemp("pipeline")
    tokenizers.write_clip_tokenizer(root / "tokenizer", CAPTIONS, tokenizers.END)
    tokenizers.write_clip_tokenizer(root / "tokenizer_2", CAPTIONS, "!")
    tokenizers.write_t5_tokenizer(root / "tokenizer_3", CAPTIONS)
    vocab = len(AutoTokenizer.from_pretrained(root / "tokenizer"))
    torch.manual_seed(0)
    towers = {
        "text_encoder": clip_tower(vocab, eos=vocab - 1),
        "text_encoder_2": clip_tower(vocab, eos=2, hidden_size=40, hidden_act="gelu"),
        "text_encoder_3": T5EncoderModel(
            T5Config(
                vocab_size=len(AutoTokenizer.from_pretrained(root / "tokenizer_3")),
                d_model=T5_WIDTH,
                d_kv=16,
                d_ff=96,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ),
    }
    for name, model in towers.items():
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn(p.shape)
        model.eval().save_pretrained(root / name)
    (root / "model_index.json").write_text(json.dumps(MODEL_INDEX))
    (root / "transformer").mkdir()
    transformer = {"joint_attention_dim": T5_WIDTH}
    (root / "transformer" / "config.json").write_text(json.dumps(transformer))
    return root


@pytest.fixture(scope="module")
def stack(directory):
    return load_text_stack(directory)


@pytest.fixture(scope="module")
def pipeline(directory):
    clips = {
        name: CLIPTextModelWithProjection.from_pretrained(directory / name)
        for name in ("text_encoder", "text_encoder_2")
    }
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return StableDiffusion3Pipeline(
        transformer=None,
        vae=None,
        scheduler=None,
        **clips,
        text_encoder_3=T5EncoderModel.from_pretrained(directory / "text_encoder_3"),
        **{name: AutoTokenizer.from_pretrained(directory / name) for name in names},
    )


def oracle(pipeline, prompts):
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device="cpu",
            do_classifier_free_guidance=False,
            max_sequence_length=tokenizers.MAX_LENGTH,
        )
    return tokens.numpy(), pooled.numpy()


@pytest.mark.parametrize(
    "prompts",
    [
        CAPTIONS,
        [""],
        ["Zürich, 10% off!", "A  RED\tCircle"],  # other alphabets, case and white space
        ["a small red cat in the snow " * 3],  # cut off
    ],
)
def test_encoding_equals_diffusers(stack, pipeline, prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = stack.encode(prompts)
    tokens, pooled = oracle(pipeline, prompts)
    assert isinstance(ours.tokens, np.ndarray) and ours.tokens.dtype == np.float32
    assert ours.tokens.shape == (len(prompts), 2 * tokenizers.MAX_LENGTH, T5_WIDTH)
    assert np.abs(ours.tokens - tokens).max() < 1e-5 * np.abs(tokens).max()
    assert np.abs(ours.pooled - pooled).max() < 1e-5 * np.abs(pooled).max()


def test_long_prompts_warn_once(stack):
    long = ["a red cat " * 8, "a blue house " * 9]
    with pytest.warns(UserWarning, match=r"2 of 3 prompts .*cut off") as caught:
        stack.encode([*long, "a thing"])
    assert len(caught) == 1


def test_bf16_is_kept_and_given_as_fp32(directory, stack):
    half = load_text_stack(directory, dtype=jnp.bfloat16)
    kept = [tower.variables for tower in half.towers.values()]
    assert {a.dtype for a in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    ours, full = half.encode(CAPTIONS), stack.encode(CAPTIONS)
    assert ours.tokens.dtype == np.float32
    assert np.abs(ours.tokens - full.tokens).max() < 0.05 * np.abs(full.tokens).max()


@pytest.mark.parametrize(
    "missing, message",
    [
        ("tokenizer_3", r"model_index\.json: names tokenizer_3, which is not there"),
        ("tokenizer_3/tokenizer.json", "tokenizer_3: no usable tokenizer: holds none of"),
        ("text_encoder_2/config.json", r"text_encoder_2/config\.json: no such file"),
        ("text_encoder_3/model.safetensors", "text_encoder_3: holds no model.safetensors"),
    ],
)
def test_incomplete_directory_is_named(directory, tmp_path, missing, message):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "tokenizer_3" / "spiece.model").unlink()  # tokenizer.json is enough
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileError, match=message):
        load_text_stack(copy)


CLIP = ("text_encoder", "text_encoder_2")
DAMAGED = [  # encoders, entry, value, what it must be
    *(
        (CLIP, key, value, "a whole number from 1 to 1000")
        for key, value in (("num_hidden_layers", "2"), ("num_hidden_layers", 10**7))
    ),
    (CLIP, "vocab_size", -5, "a whole number from 1 to 1048576"),
    (CLIP, "vocab_size", 1e12, "a whole number from 1 to 1048576"),
    (CLIP, "hidden_size", 0, "a whole number from 1 to 1048576"),
    (CLIP, "hidden_size", "x", "a whole number from 1 to 1048576"),
    (CLIP, "num_attention_heads", 0, "a whole number from 1 to 1048576"),
    (CLIP, "eos_token_id", "x", "a whole number from 0 to 1048576"),
    (CLIP, "eos_token_id", [1], "a whole number from 0 to 1048576"),
    (CLIP, "layer_norm_eps", "x", "a number from 0 to 1"),
    (CLIP, "hidden_act", 5, "a string"),
    (("text_encoder_3",), "num_layers", "2", "a whole number from 1 to 1000"),
    (("text_encoder_3",), "num_layers", 10**7, "a whole number from 1 to 1000"),
    (("text_encoder_3",), "vocab_size", 1e12, "a whole number from 1 to 1048576"),
    (("text_encoder_3",), "d_model", 0, "a whole number from 1 to 1048576"),
    (("text_encoder_3",), "d_ff", True, "a whole number from 1 to 1048576"),
    (("text_encoder_3",), "num_heads", 0, "a whole number from 1 to 1048576"),
    (("text_encoder_3",), "relative_attention_num_buckets", 1, "a whole number from 4"),
    (("text_encoder_3",), "relative_attention_max_distance", 8, "more than .* 4 = 8"),
    (("text_encoder_3",), "feed_forward_proj", 5, "a string"),
]


@pytest.mark.parametrize(
    "part, key, value, right",
    [(part, *case) for parts, *case in DAMAGED for part in parts],
)
def test_a_damaged_config_is_a_sentence(directory, tmp_path, part, key, value, right):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    shown = re.escape(reprlib.repr(value))
    message = rf"{part}/config\.json: {key} = {shown} is not supported: it must be {right}"
    with pytest.raises(WeightsError, match=message):
        load_text_stack(copy)
