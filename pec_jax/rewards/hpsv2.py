"""HPSv2: what people prefer, by an OpenCLIP ViT-H/14 fine-tuned on rankings of images.

score = <f_image, f_text>, unit features, without a scale; published tables show it times 100.
Versions 2.0 and 2.1 are two files of weights for one network, `HPS_v2_compressed.pt` and
`HPS_v2.1_compressed.pt` of xswu/HPSv2, and their scores are not comparable. Images that are not
square get black bars. Texts are cleaned as HPSv2 does, but for ftfy's repair of broken encodings.

Source: Wu et al. 2023, arXiv 2306.09341; tgxs002/HPSv2@866735e: hpsv2/img_score.py.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

from pec_jax.data.prompts import Prompt
from pec_jax.perception.networks import Networks
from pec_jax.perception.published import HPSV2
from pec_jax.rewards.base import ModelRewardOptions, Reward, register
from pec_jax.rewards.clip import cosine_reward, two_tower_encoder
from pec_jax.types import PyTree

NAME = "hpsv2"


def cleaned(text: str) -> str:
    """HTML's escapes undone twice, white space joined; the tokenizer makes it lower case."""
    return " ".join(html.unescape(html.unescape(text)).split())


@register(NAME, ModelRewardOptions)
def make(options: ModelRewardOptions, networks: Networks) -> Reward:
    """The pair's cosine, of either version."""
    reward = cosine_reward(NAME, two_tower_encoder(NAME, options, networks, HPSV2))

    def prepare(variables: PyTree, prompts: Sequence[Prompt]) -> PyTree:
        clean = [dataclasses.replace(prompt, text=cleaned(prompt.text)) for prompt in prompts]
        return reward.prepare(variables, clean)

    return dataclasses.replace(reward, prepare=prepare)
