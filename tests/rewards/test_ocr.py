"""The OCR reward: what it refuses at the start, and its scores inside a jitted function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from pec_jax.config import ConfigError
from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.host import ocr
from pec_jax.rewards.host import decode_prompts
from pec_jax.rewards.ocr import OcrOptions, prepare, scores

PROMPTS = [
    Prompt('A sign that says "Hello World"', {"id": 1}),
    Prompt("A mug with “Good day” on it"),
]


def picture(text):
    """A line of text; [H, W, 3] in [0, 1]."""
    image = Image.new("RGB", (384, 128), (250, 240, 200))
    ImageDraw.Draw(image).text((16, 40), text, (20, 30, 90), ImageFont.load_default(size=40))
    return np.asarray(image, np.float32) / 255


def test_each_picture_is_scored_against_the_text_that_its_own_prompt_quotes():
    reward = REWARDS["ocr"].make(OcrOptions(workers=1, limit_side_len=128), None)
    drawn = [["Hello World", "Good day"], ["Good day", "Good dog"]]
    images = jnp.stack([jnp.stack([picture(text) for text in row]) for row in drawn])
    found = jax.jit(reward.score)({}, images, reward.prepare({}, PROMPTS))
    assert found.dtype == jnp.float32 and (reward.name, reward.network) == ("ocr", "")
    expected = [
        [ocr.ocr_score(text, ocr.target_text(p.text)) for text in row]
        for p, row in zip(PROMPTS, drawn)
    ]
    assert expected[0][0] == expected[1][0] == 1.0 and expected[1][1] == 1 - 2 / 7
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_failure_is_nan_inside_a_jitted_function():
    reward = REWARDS["ocr"].make(OcrOptions(workers=1, limit_side_len=128, timeout=0.1), None)
    large = np.zeros((1, 1, 1024, 1024, 3), np.float32)  # takes longer
    found = jax.jit(reward.score)({}, large, reward.prepare({}, PROMPTS[:1]))
    assert np.isnan(found).all()


def test_what_could_not_be_read_is_nan_and_what_shows_nothing_is_zero():
    found = scores([None, "", "good  DAY!"], [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    np.testing.assert_array_equal(found, [np.nan, 0.0, 1.0])


def test_prompts_travel_whole():
    assert decode_prompts(prepare({}, PROMPTS)) == PROMPTS


@pytest.mark.parametrize("text", ["a red cat", 'a sign that says ""', "the dog's “ ” sign"])
def test_a_prompt_that_quotes_nothing_is_refused_by_name(text):
    with pytest.raises(ConfigError) as refused:
        prepare({}, [*PROMPTS, Prompt(text)])
    assert repr(text) in str(refused.value) and "1 of 3 prompts" in str(refused.value)


def test_an_engine_that_is_not_installed_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(ocr, "PACKAGES", ("jax", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs no_such_package: pip install 'pec_jax\[ocr\]'"):
        prepare({}, PROMPTS)


def test_the_step_can_be_planned_without_prompts_that_quote_and_without_the_engine():
    reward = REWARDS["ocr"].make(OcrOptions(), None)
    planned = reward.input_shapes(3)
    assert planned.shape[0] == 3 and planned.dtype == np.uint8
    images = jax.ShapeDtypeStruct((3, 2, 64, 64, 3), jnp.float32)
    assert jax.eval_shape(reward.score, {}, images, planned).shape == (3, 2)
