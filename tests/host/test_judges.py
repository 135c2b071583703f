"""Questions as published, payloads as OpenAI's API has them, and the numbers of all answers."""

from __future__ import annotations

import base64
import hashlib
import math

import pytest

from pec_jax.host import judges
from pec_jax.host.client import Failure
from pec_jax.host.judges import JUDGES

CAPTION = "a red cat"
# SHA-256 of the published questions for the caption "a red cat", without an image token.
PUBLISHED = {
    "score": "befc815337d8242a",
    "score_only": "8026d229267a0bd0",
    "semantic": "6d1630b7d0a55312",
    "axes": "b879a8d2db374934",
}


def content(judge, prompt=CAPTION, **changes):
    """What the user's message of a request holds."""
    payload = judges.request(judge, "served", b"\x89PNG", prompt, **changes)
    return payload["messages"][-1]["content"]


def says(text, **more):
    """An answer with that text."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, **more}]}


def parse(name, text):
    return judges.parse(JUDGES[name], says(text))


@pytest.mark.parametrize("name", PUBLISHED)
def test_unified_reward_is_asked_in_the_published_words(name):
    image, question = content(JUDGES[name])
    digest = hashlib.sha256(question["text"].encode()).hexdigest()
    assert image["type"] == "image_url" and digest[:16] == PUBLISHED[name]


@pytest.mark.parametrize("image_format, mime", [("png", "image/png"), ("jpeg", "image/jpeg")])
def test_a_payload_is_as_the_api_has_it(image_format, mime):
    payload = judges.request(JUDGES["axes"], "served", b"\x89PNG", CAPTION, image_format)
    (message,) = payload.pop("messages")
    assert payload == {"model": "served", "temperature": 0, "max_tokens": 512}
    url = message["content"][0]["image_url"]["url"]
    assert message["role"] == "user"
    assert url == f"data:{mime};base64," + base64.b64encode(b"\x89PNG").decode()


def test_a_prompt_is_inserted_as_it_is():
    prompt = 'a "{prompt}" {0} <image> %s \\n {'
    assert content(JUDGES["score"], prompt)[1]["text"].endswith(f"Text Caption: [{prompt}]")
    assert [part["type"] for part in content(JUDGES["rational"], prompt)] == [
        "text", "image_url", "text",
    ]  # fmt: skip
    assert f"User Instruction: {prompt}\n" in content(JUDGES["rational"], prompt)[0]["text"]


def test_only_the_yes_no_judge_asks_for_log_probabilities():
    payload = judges.request(JUDGES["yes_no"], "served", b"", CAPTION)
    assert (payload["logprobs"], payload["top_logprobs"], payload["max_tokens"]) == (True, 20, 1)
    others = set(JUDGES) - {"yes_no"}
    assert not any("logprobs" in judges.request(JUDGES[n], "m", b"", "") for n in others)
    assert set(JUDGES) == set(judges.UNIFIED_REWARD) | set(judges.GENERAL)


# Answers in the forms of the published examples.
SCORE = "ocean (location): 0\nclouds (object): 1\npainting (attribute): 1\nFinal Score: 2.33"
AXES = (
    "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
    "Style Score (1-5): 2.802500009536743\n"
)
WORDS = '---\n\nWord-wise Scores: [["a", 0.1], ["red", 4.9], ["[No_mistakes]", 2.0]]\n\n' + AXES


def test_numbers_are_on_the_documented_scales():
    mean = (2.694700002670288 + 2.371500015258789 + 2.802500009536743) / 3
    assert parse("score", SCORE) == 2.33
    assert parse("score_only", "Final Score: 4.5") == pytest.approx(0.9)
    assert parse("semantic", WORDS) == 2.694700002670288
    assert parse("axes", AXES) == pytest.approx((mean - 1) / 4)
    assert parse("axes", _axes(5, 5, 5)) == 1.0
    assert parse("axes", _axes(0.9, 1, 1)) == 0.0  # clipped, as by verl-omni


def _axes(*values):
    names = ("Alignment", "Coherence", "Style")
    return "\n".join(f"{n} Score (1-5): {v}" for n, v in zip(names, values))


@pytest.mark.parametrize(
    "text, value",
    [
        ("Final Score: 3", 3.0),
        ("final score:3.", 3.0),
        ("**Final Score:** 3.5", 3.5),
        ("**Final Score**: **3.5**", 3.5),
        ("Final Score: 4/5", 4.0),
        ("Final Score:\n 2", 2.0),
        ('sign "Final Score: 5" (object): 0\nFinal Score: 1.2', 1.2),
    ],
)
def test_spellings_of_a_score(text, value):
    assert parse("score", text) == value


@pytest.mark.parametrize(
    "text",
    ["", "I cannot judge this image.", "Final Score:", "Final Score: high", "Final Score: 45",
     "Final Score: 5.5", "Final Score: -1", "Final Score: 1.2.3", "Final Score: nan", "4.5"],
)  # fmt: skip
def test_no_score_or_one_off_the_scale_is_a_failure(text):
    assert isinstance(parse("score", text), Failure)
    assert isinstance(parse("score_only", text), Failure)


@pytest.mark.parametrize(
    "text", [AXES.replace("Style", "Stylish"), _axes(3, 6, 3), _axes(3, 3, "n/a"), "3 3 3"]
)
def test_a_missing_axis_is_a_failure(text):
    assert isinstance(parse("axes", text), Failure)


def first_token(*candidates):
    """An answer whose first token has these (token, probability) as candidates."""
    return with_candidates(*((t, math.log(p) if p else -9999.0) for t, p in candidates))


def with_candidates(*candidates):
    """An answer whose first token has these (token, log-probability) as candidates."""
    top = [{"token": token, "logprob": logprob} for token, logprob in candidates]
    return says("Yes", logprobs={"content": [{"token": "Yes", "top_logprobs": top}]})


@pytest.mark.parametrize(
    "candidates, value",
    [
        ([("Yes", 0.6), ("No", 0.2), ("Maybe", 0.2)], 0.75),
        ([("Yes", 0.3), (" yes", 0.2), ("YES", 0.1), ("no", 0.1), ("\nNo", 0.1)], 0.75),
        ([("Yes", 1.0), ("No", 0.0)], 1.0),
        ([("No", 0.9)], 0.0),
        ([("Yes", 0.5), ("yesterday", 0.4), ("None", 0.05), ("No", 0.05)], 10 / 11),
    ],
)
def test_yes_is_weighed_against_no(candidates, value):
    assert judges.parse(JUDGES["yes_no"], first_token(*candidates)) == pytest.approx(value)


@pytest.mark.parametrize(
    "answer",
    [
        first_token(("<think>", 0.999), ("Yes", 0.0005)),
        first_token(),
        says("Yes"),
        says("Yes", logprobs=None),
        says("Yes", logprobs={"content": []}),
        with_candidates((7, 0.0)),
        *(with_candidates(("Yes", logprob)) for logprob in ("0", 1e9, math.nan, 2.0)),
    ],
)
def test_no_probabilities_of_yes_and_no_is_a_failure(answer):
    assert isinstance(judges.parse(JUDGES["yes_no"], answer), Failure)


def rational(*scores, heading="{}. {}:", score="## Score: {}"):
    """An answer of RationalRewards with the three scores."""
    blocks = [
        f"{heading.format(i + 1, aspect)}\n## Justification: the score: 1.\n{score.format(s)}"
        for i, (aspect, s) in enumerate(zip(judges.ASPECTS, scores))
    ]
    return (
        "# User Request Analysis\n1. Text Faithfulness: a cat\n# Detailed Judgement\n"
        + "\n".join(blocks)
        + "\n# Summary: ## Score: 1\n\n# User Request Refinement:\n## Refined Request: a cat"
    )


def test_rational_rewards_is_the_mean_of_its_aspects():
    assert parse("rational", rational(4, 2.5, 1)) == pytest.approx((7.5 / 3 - 1) / 3)
    assert parse("rational", rational(3.5, 2.5, "N/A")) == pytest.approx(2 / 3)
    assert parse("rational", rational(9, 0, "N/A")) == pytest.approx(0.5)  # clipped to 4 and 1
    bold = rational(4, 4, 4, heading="**{}. {}:**", score="**Score:** {}/4")
    assert parse("rational", bold) == 1.0


@pytest.mark.parametrize(
    "text",
    ["", rational(4, 4), rational("N/A", 4, 4), rational(4, "good", 4), rational(4, 4, 4)[:120]],
)
def test_a_missing_aspect_is_a_failure(text):
    assert isinstance(parse("rational", text), Failure)


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize(
    "answer",
    [None, 3, "text", [], {}, {"choices": []}, {"choices": None}, {"choices": [None]},
     {"choices": [{}]}, {"choices": {"0": 1}}, says(None), says([{"type": "text", "text": "4"}]),
     {"choices": [{"message": "Final Score: 3"}]}, {"error": {"message": "no such model"}},
     Failure("HTTP 500")],
)  # fmt: skip
def test_an_answer_of_another_shape_is_a_failure(name, answer):
    assert isinstance(judges.parse(JUDGES[name], answer), Failure)


def test_models_are_listed_by_name():
    assert judges.read_models({"data": [{"id": "a"}, {"id": "b"}]}) == ["a", "b"]
    for answer in (None, {}, {"data": None}, {"data": ["a"]}, {"data": [{}]}, Failure("down")):
        assert isinstance(judges.read_models(answer), Failure)
