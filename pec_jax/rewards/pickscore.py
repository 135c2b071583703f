"""PickScore and its like: what people prefer, by a CLIP fine-tuned on pairwise choices.

Kirstain et al. 2023, arXiv 2305.01569. Flow-GRPO divides the score by 26, which brings it near 1.
The embedded model has three such: `pickscore`; `pickscore_taste`, which asked a crowd that has
taste and no eye for craft; and `hps`, which asked other people and is another network. One trains
on one of the first two and evaluates with the last, which tells a better image from one that games.
"""

from __future__ import annotations

from pec_jax.perception.networks import Networks
from pec_jax.rewards.base import ModelRewardOptions, Reward, register
from pec_jax.rewards.clip import cosine_reward, two_tower_encoder

SCALE = 26.0


NAMES = ("pickscore", "pickscore_taste", "hps")


def _register(name: str) -> None:
    @register(name, ModelRewardOptions)
    def make(options: ModelRewardOptions, networks: Networks) -> Reward:
        """exp(logit_scale) * cosine / 26.

        Raises:
            ValueError: an encoder without a text tower or a logit scale.
        """
        encoder = two_tower_encoder(name, options, networks)
        logit_scale = encoder.logit_scale
        if logit_scale is None:
            raise ValueError(
                f"The encoder {encoder.name!r} has no logit scale; use a PickScore model."
            )
        # `logit_scale` gives exp of what is stored.
        return cosine_reward(
            name, encoder, lambda variables, cosine: logit_scale(variables) * cosine / SCALE
        )


for _name in NAMES:
    _register(_name)
