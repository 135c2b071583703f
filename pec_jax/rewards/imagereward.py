"""ImageReward: what people prefer, by a BLIP that reads the prompt while it looks at the image.

r = (head(h) - mean) / std, h the first of the text's tokens; about 0 in the mean over the data it
was trained on.

Source: Xu et al. 2023, arXiv 2304.05977; THUDM/ImageReward@c1392c6: ImageReward/ImageReward.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pec_jax.config.fields import field
from pec_jax.data.prompts import Prompt
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.perception.published import IMAGE_REWARD
from pec_jax.rewards.base import ModelRewardOptions, Reward, register
from pec_jax.types import PyTree

NAME = "imagereward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072


@dataclasses.dataclass(frozen=True)
class ImageRewardOptions(ModelRewardOptions):
    """The published file holds the head too; its tokenizer is BERT's, bert-base-uncased."""

    head: str = field("File or directory of the head; '' is the model's own.", "")


@register(NAME, ImageRewardOptions)
def make(options: ImageRewardOptions, networks: Networks) -> Reward:
    """The normalised score of each image with its own prompt.

    Raises:
        ValueError: an encoder that is no BLIP.
    """
    encoder = networks.encoder(NAME, options.model, IMAGE_REWARD, options.tokenizer)
    look = encoder.pair_features
    if look is None:
        raise ValueError(
            f"The encoder {encoder.name!r} does not read a text and an image together; the reward "
            f"{NAME!r} needs a BLIP, such as THUDM/ImageReward."
        )
    head = networks.head(networks.directory(NAME, options.head or options.model), encoder.pair_dim)

    def prepare(variables: PyTree, prompts: Sequence[Prompt]) -> PyTree:
        return encoder.tokens([prompt.text for prompt in prompts])

    def score(variables: PyTree, images: Array, tokens: PyTree) -> Array:
        network, affine = variables
        groups, size = images.shape[:2]
        flat = to_uint8_levels(images).reshape(-1, *images.shape[2:])
        ids, mask = (jnp.repeat(a, size, axis=0) for a in tokens)
        features = look(network, (ids, mask), flat)
        return (affine_score(features, affine).reshape(groups, size) - MEAN) / STD

    shape = (encoder.text_length,)
    return Reward(
        NAME,
        score,
        prepare,
        network=(encoder.network, head),
        input_shapes=lambda n: (jax.ShapeDtypeStruct((n, *shape), jnp.int32),) * 2,
    )


def affine_score(features: Array, affine: PyTree) -> Array:
    """x . kernel + bias in float32: features [N, d] -> [N]."""
    product = jnp.dot(features, affine["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + affine["bias"]
