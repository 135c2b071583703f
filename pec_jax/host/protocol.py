"""Our own protocol for reward servers: JSON and PNG, version 1.

    POST {url}/score   {"version": 1, "images": [base64 PNG, ...], "prompts": ["a red cat", ...],
                        "metadata": [{...}, ...]}
              answers  {"scores": [0.7, null, ...]}
    GET  {url}/health
              answers  {"name": "my judge", "version": 1}

The three lists of a request have the same length, and so have the scores: number i judges image i,
and null says that it could not be judged. A prompt's metadata are the other fields of its line in a
.jsonl file. Images are 8-bit RGB. launch/reward_server.py is an example of a server.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pec_jax.host.client import Failure

VERSION = 1
SCORE, HEALTH = "/score", "/health"


def request(
    images: Sequence[bytes], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The body of a POST.

    Args:
        images: N PNG files.
        prompts: N texts.
        metadata: N objects that JSON can hold.

    Raises:
        ValueError: not the same number of each.
    """
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"A request needs as many images as prompts and metadata; it has {len(images)}, "
            f"{len(prompts)} and {len(metadata)}."
        )
    return {
        "version": VERSION,
        "images": [base64.b64encode(image).decode("ascii") for image in images],
        "prompts": list(prompts),
        "metadata": [dict(item) for item in metadata],
    }


def read_scores(answer: Any, count: int) -> list[float | Failure]:
    """The scores of an answer.

    Args:
        answer: decoded JSON, or the failure to get any.
        count: N, how many images were asked about.

    Returns:
        N finite numbers or failures. An answer of another shape fails as a whole; one that is
        right but for single scores, only there.
    """
    if isinstance(answer, Failure):
        return [answer] * count
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        return [Failure("the answer has no list 'scores'")] * count
    if len(scores) != count:
        return [Failure(f"the answer has {len(scores)} scores for {count} images")] * count
    return [_read_score(score) for score in scores]


def _read_score(score: Any) -> float | Failure:
    if score is None:
        return Failure("the server could not judge the image")
    if isinstance(score, bool) or not isinstance(score, int | float):
        return Failure(f"a score is of type {type(score).__name__}, not a number")
    try:
        value = float(score)
    except OverflowError:  # an integer of hundreds of digits
        value = math.inf
    return value if math.isfinite(value) else Failure("a score is not finite")


def read_health(answer: Any) -> str | Failure:
    """The name of the judge, from what GET {url}/health answers.

    Args:
        answer: decoded JSON, or the failure to get any.
    """
    if isinstance(answer, Failure):
        return answer
    if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
        return Failure(f"GET {HEALTH} does not answer with a name and a version")
    if answer.get("version") != VERSION:
        version = str(answer.get("version"))[:20]
        return Failure(f"it speaks version {version} of the protocol, not {VERSION}")
    return answer["name"]
