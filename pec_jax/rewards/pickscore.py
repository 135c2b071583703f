"""PickScore: what people prefer, by a CLIP fine-tuned on pairwise choices.

Kirstain et al. 2023, arXiv 2305.01569. Flow-GRPO divides the score by 26, which brings it near 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from pec_jax.rewards.base import Reward, register
from pec_jax.rewards.clip import pair_cosine, require_encoder, text_features

Array = jax.Array

SCALE = 26.0


@register("pickscore")
def make(options: Mapping[str, Any]) -> Reward:
    """PickScore as a reward: exp(logit_scale) * cosine / 26.

    Args:
      options: "encoder": an Encoder with a text tower and a logit scale.
    """
    encoder = require_encoder("pickscore", options)
    logit_scale = encoder.logit_scale
    if logit_scale is None:
        raise ValueError(f"The encoder {encoder.name!r} has no logit scale; use a PickScore model.")

    def score(params: Any, images: Array, text: Array) -> Array:
        cosine = pair_cosine(encoder, params, images, text)
        return logit_scale(params) * cosine / SCALE  # the scale is already exp(stored)

    return Reward(
        name="pickscore",
        prepare=lambda prompts: text_features(encoder, prompts),
        score=score,
        params=encoder.params,
    )
