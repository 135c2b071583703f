"""Aesthetic predictors: how beautiful people find an image, whatever the prompt.

score = head(f / |f|), f the features of an image encoder, on a scale from 1 to about 10.

| name | encoder | head |
|---|---|---|
| `aesthetic_v2_5` | SigLIP so400m/14 at 384 px, pooled | `aesthetic_predictor_v2_5.pth` |
| `aesthetic_laion` | OpenAI's CLIP L/14, projected | `sac+logos+ava1-l14-linearMSE.pth` |

The head of V2.5 and its code are under AGPL-3.0. Neither is part of this package: the formula is,
and users bring the file.

Sources: discus0434/aesthetic-predictor-v2-5@c0e1556; Schuhmann et al. 2022, arXiv 2210.08402, and
christophschuhmann/improved-aesthetic-predictor@6934dd8.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxtyping import Array

from pec_jax.config import ConfigError
from pec_jax.config.fields import field
from pec_jax.perception.encoder import unit
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.base import Reward, RewardOptions, register
from pec_jax.rewards.imagereward import affine_score
from pec_jax.types import PyTree

NAMES = ("aesthetic_v2_5", "aesthetic_laion")


@dataclasses.dataclass(frozen=True)
class AestheticOptions(RewardOptions):
    """An encoder of images and a head on its features."""

    model: str = field("Directory or hub id@revision of the encoder.", "")
    head: str = field("File of the head, .pth or .safetensors.", "")


def _register(name: str) -> None:
    @register(name, AestheticOptions)
    def make(options: AestheticOptions, networks: Networks) -> Reward:
        """The head's number for each image.

        Raises:
            ConfigError: no head is given.
        """
        if not options.head:
            raise ConfigError(
                f"config.rewards.{name}.head is empty: give the file of the predictor's head; "
                "docs/rewards.md says where it is published."
            )
        encoder = networks.encoder(name, options.model)
        head = networks.head(Path(options.head), encoder.dim)

        def score(variables: PyTree, images: Array, inputs: PyTree) -> Array:
            network, affine = variables
            flat = to_uint8_levels(images).reshape(-1, *images.shape[2:])
            features = unit(encoder.image_features(network, flat))
            return affine_score(features, affine).reshape(images.shape[:2])

        return Reward(name, score, network=(encoder.network, head), input_shapes=lambda n: {})


for _name in NAMES:
    _register(_name)
