"""PickScore and its like: what people prefer, by a CLIP fine-tuned on pairwise choices.

Kirstain et al. 2023, arXiv 2305.01569. Its score is 100 times the cosine. Flow-GRPO divides that by
26, which brings it near 1; the paper's Table 1 shows the cosine itself (`scale`).
The embedded model has three such: `pickscore`; `pickscore_taste`, which asked a crowd that has
taste and no eye for craft; and `hps`, which asked other people and is another network. One trains
on one of the first two and evaluates with the last, which tells a better image from one that games.
"""

from __future__ import annotations

import dataclasses

from pec_jax.config.fields import field
from pec_jax.perception.networks import Networks
from pec_jax.rewards.base import ModelRewardOptions, Reward, register
from pec_jax.rewards.clip import SCALES, cosine_reward, two_tower_encoder

NAMES = ("pickscore", "pickscore_taste", "hps")


@dataclasses.dataclass(frozen=True)
class PickscoreOptions(ModelRewardOptions):
    """As Flow-GRPO scales it."""

    scale: str = field(
        "The cosine, or exp(logit_scale) times it, divided.", "score/26", choices=SCALES
    )


def _register(name: str) -> None:
    @register(name, PickscoreOptions)
    def make(options: PickscoreOptions, networks: Networks) -> Reward:
        """exp(logit_scale) * cosine / 26, or on another scale."""
        return cosine_reward(name, two_tower_encoder(name, options, networks), options.scale)


for _name in NAMES:
    _register(_name)
