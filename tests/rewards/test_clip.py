import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pec_jax.data.prompts import Prompt
from pec_jax.perception.encoders import Encoder
from pec_jax.rewards import clip, pickscore
from pec_jax.rewards.base import combine

WORDS = ["<pad>", "<unk>", "a", "red", "blue", "circle"]
PROMPTS = [Prompt("a red circle"), Prompt("a blue circle")]


def small_encoder():
    """An encoder of two towers, small enough to compute by hand below."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=5
    )
    rng = np.random.default_rng(0)
    params = {
        "embedding": jnp.asarray(rng.normal(size=(len(WORDS), 8)), jnp.float32),
        "projection": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32),
        "log_scale": jnp.float32(1.5),
    }
    return Encoder(
        name="small",
        dim=8,
        params=params,
        image_features=lambda p, images: images.mean((1, 2)) @ p["projection"],
        text_features=lambda p, ids: p["embedding"][ids].sum(1),
        logit_scale=lambda p: jnp.exp(p["log_scale"]),
        tokenizer=tokenizer,
        text_length=5,
    )


def cosine_by_hand(encoder, images):
    """Loops over pairs in float64, from the definition."""
    table, projection = (np.float64(encoder.params[k]) for k in ("embedding", "projection"))
    result = np.zeros(images.shape[:2])
    for p, prompt in enumerate(PROMPTS):
        ids = [WORDS.index(w) for w in prompt.text.split()]
        text = table[ids + [0] * (5 - len(ids))].sum(0)
        for k, image in enumerate(images[p]):
            levels = np.round(np.clip(np.float64(image), 0, 1) * 255) / 255
            feature = levels.mean((0, 1)) @ projection
            result[p, k] = feature @ text / np.linalg.norm(feature) / np.linalg.norm(text)
    return result


IMAGES = jax.random.uniform(jax.random.key(0), (2, 3, 4, 4, 3), minval=-0.1, maxval=1.1)


def test_clip_is_the_cosine_of_each_pair():
    encoder = small_encoder()
    reward = clip.make({"encoder": encoder})
    scores = jax.jit(reward.score)(reward.params, IMAGES, reward.prepare(PROMPTS))
    np.testing.assert_allclose(scores, cosine_by_hand(encoder, IMAGES), atol=1e-6)
    assert scores.shape == (2, 3) and scores.dtype == jnp.float32


def test_pickscore_scales_the_cosine():
    encoder = small_encoder()
    reward = pickscore.make({"encoder": encoder})
    scores = jax.jit(reward.score)(reward.params, IMAGES, reward.prepare(PROMPTS))
    np.testing.assert_allclose(
        scores, np.exp(1.5) * cosine_by_hand(encoder, IMAGES) / 26, atol=1e-6
    )
    # The scale is read from the parameters of the call.
    other = {**encoder.params, "log_scale": jnp.float32(0.0)}
    unscaled = reward.score(other, IMAGES, reward.prepare(PROMPTS))
    np.testing.assert_allclose(scores, np.exp(1.5) * np.asarray(unscaled), rtol=1e-5)


def test_both_by_name():
    encoder = small_encoder()
    options = {"encoder": encoder}
    reward = combine({"clip": 1.0, "pickscore": 2.0}, {"clip": options, "pickscore": options})
    total, _ = reward.score(reward.params, IMAGES, reward.prepare(PROMPTS))
    cosine = cosine_by_hand(encoder, IMAGES)
    np.testing.assert_allclose(total, cosine * (1 + 2 * np.exp(1.5) / 26), atol=1e-5)


def test_text_features_of_more_prompts_than_a_batch():
    encoder = small_encoder()
    prompts = [PROMPTS[i % 2] for i in range(clip.TEXT_BATCH + 5)]
    features = clip.text_features(encoder, prompts)
    assert features.shape == (len(prompts), 8) and isinstance(features, np.ndarray)
    few = clip.text_features(encoder, PROMPTS)
    np.testing.assert_allclose(features, np.stack([few[i % 2] for i in range(len(prompts))]))
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-6)


def test_one_warning_for_all_that_is_cut():
    encoder = small_encoder()
    long = "a red circle a red circle a"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = clip.tokenize(encoder, ["a", long, long + " blue"])
    assert len(caught) == 1
    assert "2 of 3 prompts are longer than the 5 tokens" in str(caught[0].message)
    np.testing.assert_array_equal(ids, [[2, 0, 0, 0, 0], [2, 3, 5, 2, 3], [2, 3, 5, 2, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.tokenize(encoder, ["a red circle a red"])  # exactly the length


def test_pickscore_needs_a_logit_scale():
    with pytest.raises(ValueError, match="'small' has no logit scale"):
        pickscore.make({"encoder": dataclasses.replace(small_encoder(), logit_scale=None)})


@pytest.mark.parametrize("make", [clip.make, pickscore.make])
def test_encoder_must_read_text(make):
    with pytest.raises(ValueError, match="needs the option 'encoder'"):
        make({})
    blind = dataclasses.replace(small_encoder(), tokenizer=None, text_features=None, text_length=0)
    with pytest.raises(ValueError, match="'small' reads no text"):
        make({"encoder": blind})
    with pytest.raises(ValueError, match="Valid options: encoder"):
        make({"encoder": small_encoder(), "scale": 2})
