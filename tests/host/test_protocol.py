"""The protocol of reward servers: what is sent, and what of an answer is believed."""

from __future__ import annotations

import base64
import json
import math

import pytest

from pec_jax.host import protocol
from pec_jax.host.client import Failure


def test_a_request_is_as_documented():
    request = protocol.request([b"\x89PNG1", b"\x89PNG2"], ["a cat", "ü"], [{}, {"tag": "colors"}])
    assert json.loads(json.dumps(request)) == {
        "version": 1,
        "images": [base64.b64encode(b"\x89PNG1").decode(), base64.b64encode(b"\x89PNG2").decode()],
        "prompts": ["a cat", "ü"],
        "metadata": [{}, {"tag": "colors"}],
    }


@pytest.mark.parametrize("lists", [([b""], [], [{}]), ([], ["a"], [{}]), ([b""], ["a"], [])])
def test_lists_of_different_lengths_are_refused(lists):
    with pytest.raises(ValueError, match="as many images as prompts and metadata"):
        protocol.request(*lists)


def test_scores_keep_their_places_and_null_is_a_failure():
    scores = protocol.read_scores({"scores": [1, None, -0.5, 1e300], "more": "ignored"}, 4)
    assert scores == [1.0, Failure("the server could not judge the image"), -0.5, 1e300]
    assert all(type(score) is float for score in (scores[0], scores[2]))


@pytest.mark.parametrize(
    "score", [math.nan, math.inf, -math.inf, 10**400, "0.5", True, [0.5], {"score": 1}]
)
def test_what_is_no_finite_number_fails_alone(score):
    first, second = protocol.read_scores({"scores": [score, 0.5]}, 2)
    assert isinstance(first, Failure) and second == 0.5


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({}, "no list 'scores'"),
        ({"scores": "0.5"}, "no list 'scores'"),
        ({"scores": None}, "no list 'scores'"),
        ([0.5, 0.5], "no list 'scores'"),
        (None, "no list 'scores'"),
        ({"scores": [0.5]}, "1 scores for 2 images"),
        ({"scores": [0.5] * 3}, "3 scores for 2 images"),
        (Failure("HTTP 500"), "HTTP 500"),
    ],
)
def test_an_answer_of_another_shape_fails_as_a_whole(answer, reason):
    scores = protocol.read_scores(answer, 2)
    assert len(scores) == 2 and scores[0] == scores[1]
    assert isinstance(scores[0], Failure) and reason in scores[0].reason


def test_health_is_a_name_and_the_version():
    assert protocol.read_health({"name": "my judge", "version": 1}) == "my judge"


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({"name": "my judge", "version": 2}, "version 2 of the protocol, not 1"),
        ({"name": "my judge"}, "version None"),
        ({"version": 1}, "does not answer with a name"),
        ({"name": 7, "version": 1}, "does not answer with a name"),
        ("ok", "does not answer with a name"),
        (Failure("no connection"), "no connection"),
    ],
)
def test_another_health_is_a_failure(answer, reason):
    found = protocol.read_health(answer)
    assert isinstance(found, Failure) and reason in found.reason
