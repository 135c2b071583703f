"""CLIP score: how well an image fits its prompt, by the cosine of CLIP features.

CLIP: Radford et al. 2021, arXiv 2103.00020; as a score of generated images: Hessel et al. 2021,
arXiv 2104.08718 (without their factor of 2.5 and without their clipping at 0).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pec_jax.data.prompts import Prompt
from pec_jax.perception.encoder import Encoder, unit
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.base import ModelRewardOptions, Reward, register
from pec_jax.types import PyTree

TEXT_BATCH = 64  # prompts encoded at a time


def two_tower_encoder(name: str, options: ModelRewardOptions, networks: Networks) -> Encoder:
    """The encoder of a reward, which must read texts as well as images.

    Raises:
        ValueError: one without a text tower.
    """
    encoder = networks.encoder(name, options.model)
    if encoder.text_features is None:
        raise ValueError(
            f"The encoder {encoder.name!r} reads no text, so that the reward {name!r} cannot "
            "compare its images with prompts. Use a CLIP-like encoder."
        )
    return encoder


def cosine_reward(name: str, encoder: Encoder, scale=lambda variables, cosine: cosine) -> Reward:
    """A reward that is a function of the pair's cosine.

    Args:
        name: of the reward.
        encoder: of two towers.
        scale: (variables, cosines [P, K]) -> [P, K].
    """

    def score(variables: PyTree, images: Array, text: PyTree) -> Array:
        return scale(variables, pair_cosine(encoder, variables, images, text))

    return Reward(
        name,
        score,
        prepare=lambda variables, prompts: text_features(encoder, variables, prompts),
        network=encoder.network,
        input_shapes=lambda n: jax.ShapeDtypeStruct((n, encoder.dim), jnp.float32),
    )


def tokenize(encoder: Encoder, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
    """Token ids, padded to the encoder's length; what is longer is cut, with one warning.

    Args:
        encoder: with a text tower.
        texts: N texts.
    """
    whole = encoder.tokenizer(list(texts), padding=False, truncation=False, verbose=False)
    lengths = [len(ids) for ids in whole["input_ids"]]
    too_long = [text for text, n in zip(texts, lengths) if n > encoder.text_length]
    if too_long:
        warnings.warn(
            f"{len(too_long)} of {len(texts)} prompts are longer than the {encoder.text_length} "
            f"tokens that {encoder.name!r} reads, and are cut for its score; the first is "
            f"{too_long[0][:80]!r}.",
            stacklevel=2,
        )
    return encoder.tokenize(texts)


def text_features(
    encoder: Encoder, variables: PyTree, prompts: Sequence[Prompt]
) -> Float[np.ndarray, "n d"]:
    """Unit text features of a prompt set, once: texts do not change in training.

    Args:
        encoder: with a text tower.
        variables: of the encoder.
        prompts: N prompts.
    """
    from pec_jax.distributed import processes

    ids = tokenize(encoder, [prompt.text for prompt in prompts])
    tower = encoder.text_features
    assert tower is not None  # `require_encoder` has seen to it
    encode = jax.jit(lambda params, batch: unit(tower(params, batch)))
    # Whole batches only, so that one compilation serves them all.
    missing = -len(ids) % TEXT_BATCH
    padded = np.concatenate([ids, np.repeat(ids[-1:], missing, axis=0)])
    batches = padded.reshape(-1, TEXT_BATCH, ids.shape[1])
    features = [processes.fetch(encode(variables, batch)) for batch in batches]
    return np.concatenate(features)[: len(ids)]


def pair_cosine(
    encoder: Encoder,
    variables: PyTree,
    images: Float[Array, "p k h w 3"],
    text: Float[Array | np.ndarray, "p d"],
) -> Float[Array, "p k"]:
    """Cosine of each image with its own prompt, never with another's.

    cos[p, k] = <f_image(images[p, k]), f_text(p)>, both of length 1.

    Args:
        encoder: whose image tower is used.
        variables: of the encoder.
        images: in [0, 1]; rounded to 8 bits first.
        text: unit text features.

    Returns:
        fp32 in [-1, 1].
    """
    groups, size = images.shape[:2]
    flat = to_uint8_levels(images).reshape(-1, *images.shape[2:])
    features = unit(encoder.image_features(variables, flat)).reshape(groups, size, -1)
    return jnp.einsum("pkd,pd->pk", features, text, precision="highest")


@register("clip", ModelRewardOptions)
def make(options: ModelRewardOptions, networks: Networks) -> Reward:
    """The pair's cosine, without the logit scale."""
    return cosine_reward("clip", two_tower_encoder("clip", options, networks))
