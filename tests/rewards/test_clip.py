"""CLIP score and PickScore against loops in float64."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.networks import Networks
from pec_jax.rewards import clip
from pec_jax.rewards.combined import make_rewards
from pec_jax.weights.tensors import read_tensors, write_tensors

WORDS = ["<pad>", "<unk>", "a", "red", "blue", "cat"]
PROMPTS = [Prompt("a red cat"), Prompt("a blue cat")]
IMAGES = jax.random.uniform(jax.random.key(0), (2, 3, 4, 4, 3), minval=-0.1, maxval=1.1)


def word_tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=5
    )


# An encoder of two towers, small enough to compute by hand below.
ENCODER = Encoder(
    name="small",
    network="small",
    dim=8,
    image_features=lambda v, images: images.mean((1, 2)) @ v["projection"],
    text_features=lambda v, ids: v["embedding"][ids].sum(1),
    logit_scale=lambda v: jnp.exp(v["log_scale"]),
    tokenizer=word_tokenizer,
    text_length=5,
)
RNG = np.random.default_rng(0)
VARIABLES = {
    "embedding": jnp.asarray(RNG.normal(size=(len(WORDS), 8)), jnp.float32),
    "projection": jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32),
    "log_scale": jnp.float32(1.5),
}


class OneEncoder(Networks):
    """Whose every encoder is the same."""

    def __init__(self, encoder):
        super().__init__(own=Path(), locate=Path)
        object.__setattr__(self, "one", encoder)

    def encoder(self, name, model, *rest):
        return self.one


def make(name, encoder=ENCODER, **options):
    return REWARDS[name].make(REWARDS[name].options(**options), OneEncoder(encoder))


def cosine_by_hand(images):
    """Loops over pairs in float64, from the definition."""
    table, projection = (np.float64(VARIABLES[k]) for k in ("embedding", "projection"))
    result = np.zeros(images.shape[:2])
    for p, prompt in enumerate(PROMPTS):
        ids = [WORDS.index(w) for w in prompt.text.split()]
        text = table[ids + [0] * (5 - len(ids))].sum(0)
        for k, image in enumerate(images[p]):
            levels = np.round(np.clip(np.float64(image), 0, 1) * 255) / 255
            feature = levels.mean((0, 1)) @ projection
            result[p, k] = feature @ text / np.linalg.norm(feature) / np.linalg.norm(text)
    return result


def test_clip_is_the_cosine_of_each_pair():
    reward = make("clip")
    scores = jax.jit(reward.score)(VARIABLES, IMAGES, reward.prepare(VARIABLES, PROMPTS))
    np.testing.assert_allclose(scores, cosine_by_hand(IMAGES), atol=1e-6)
    assert scores.shape == (2, 3) and scores.dtype == jnp.float32
    assert reward.network == "small"


def test_pickscore_scales_the_cosine():
    reward = make("pickscore")
    inputs = reward.prepare(VARIABLES, PROMPTS)
    scores = jax.jit(reward.score)(VARIABLES, IMAGES, inputs)
    np.testing.assert_allclose(scores, np.exp(1.5) * cosine_by_hand(IMAGES) / 26, atol=1e-6)
    # The scale is read from the variables of the call.
    unscaled = reward.score({**VARIABLES, "log_scale": jnp.float32(0.0)}, IMAGES, inputs)
    np.testing.assert_allclose(scores, np.exp(1.5) * np.asarray(unscaled), rtol=1e-5)


@pytest.mark.parametrize(
    "name, scale, factor",
    [
        ("pickscore", "cosine", 1.0),
        ("pickscore", "score", np.exp(1.5)),
        ("clip", "score/30", np.exp(1.5) / 30),
    ],
)
def test_the_scale_is_an_option(name, scale, factor):
    reward = make(name, scale=scale)
    scores = reward.score(VARIABLES, IMAGES, reward.prepare(VARIABLES, PROMPTS))
    np.testing.assert_allclose(scores, factor * cosine_by_hand(IMAGES), atol=1e-5)


def test_both_by_name():
    weights = {"clip": 1.0, "pickscore": 2.0}
    sections = {name: REWARDS[name].options(weight=w) for name, w in weights.items()}
    reward = make_rewards(sections, OneEncoder(ENCODER))
    networks = {"small": VARIABLES}
    total, _ = reward.score(networks, IMAGES, reward.prepare(networks, PROMPTS))
    expected = cosine_by_hand(IMAGES) * (1 + 2 * np.exp(1.5) / 26)
    np.testing.assert_allclose(total, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pickscore_in_bfloat16_keeps_its_scale(tmp_path, dtype):
    """PickScore stores ln 100 as 4.60517; in bfloat16 every score would be 1.1% smaller."""
    root = tmp_path / "pickscore"
    shutil.copytree(SHAPES_DIRECTORY / "encoders" / "pickscore", root)
    tensors = dict(read_tensors(root).items())
    write_tensors(root, {**tensors, "logit_scale": np.float32(4.60517)})
    networks = Networks(own=tmp_path, locate=Path, dtype=dtype)
    pickscore, cosine = (
        REWARDS[name].make(REWARDS[name].options(model=str(root)), networks)
        for name in ("pickscore", "clip")
    )
    variables = networks.variables[pickscore.network]
    scale = networks.encoder("pickscore", "").logit_scale(variables)
    assert scale == np.exp(np.float32(4.60517)) and scale == pytest.approx(100.0, abs=1e-3)
    prompts = [Prompt("a red cat"), Prompt("a blue house")]
    inputs = pickscore.prepare(variables, prompts)
    images = jax.random.uniform(jax.random.key(1), (2, 3, 32, 32, 3))
    found, bare = (reward.score(variables, images, inputs) for reward in (pickscore, cosine))
    np.testing.assert_allclose(found, np.asarray(bare) * np.float32(scale) / 26, rtol=1e-6)


def test_text_features_of_more_prompts_than_a_batch():
    prompts = [PROMPTS[i % 2] for i in range(clip.TEXT_BATCH + 5)]
    features = clip.text_features(ENCODER, VARIABLES, prompts)
    assert features.shape == (len(prompts), 8) and isinstance(features, np.ndarray)
    few = clip.text_features(ENCODER, VARIABLES, PROMPTS)
    np.testing.assert_allclose(features, np.stack([few[i % 2] for i in range(len(prompts))]))
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-6)
    planned = make("clip").input_shapes(len(prompts))
    assert (planned.shape, planned.dtype) == (features.shape, features.dtype)


def test_one_warning_for_all_that_is_cut():
    long = "a red cat a red cat a"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = clip.tokenize(ENCODER, ["a", long, long + " blue"])
    assert len(caught) == 1
    assert "2 of 3 prompts are longer than the 5 tokens" in str(caught[0].message)
    np.testing.assert_array_equal(ids, [[2, 0, 0, 0, 0], [2, 3, 5, 2, 3], [2, 3, 5, 2, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.tokenize(ENCODER, ["a red cat a red"])  # exactly the length


def test_pickscore_needs_a_logit_scale():
    with pytest.raises(ValueError, match="'small' has no logit scale"):
        make("pickscore", dataclasses.replace(ENCODER, logit_scale=None))


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_the_encoder_must_read_text(name):
    blind = dataclasses.replace(ENCODER, tokenizer=None, text_features=None, text_length=0)
    with pytest.raises(ValueError, match=f"'small' reads no text, so that the reward '{name}'"):
        make(name, blind)
