"""CLIP score: how well an image fits its prompt, by the cosine of CLIP features.

CLIP: Radford et al. 2021, arXiv 2103.00020; as a score of generated images: Hessel et al. 2021,
arXiv 2104.08718 (without their factor of 2.5 and without their clipping at 0). Any published tower
will do: OpenAI's L/14, LAION's H/14, or DFN5B's H/14 at 378 px.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pec_jax.config.fields import field
from pec_jax.data.prompts import Prompt
from pec_jax.perception.encoder import Encoder, unit
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.base import ModelRewardOptions, Reward, register
from pec_jax.types import PyTree
from pec_jax.weights.published import Files

TEXT_BATCH = 64  # prompts encoded at a time
COSINE = "cosine"
# What is left of s = exp(logit_scale) cos; 26 is Flow-GRPO's divisor of PickScore, 30 of CLIP's.
DIVISORS = {"score": 1.0, "score/26": 26.0, "score/30": 30.0}
SCALES = (COSINE, *DIVISORS)


@dataclasses.dataclass(frozen=True)
class ClipOptions(ModelRewardOptions):
    """The paper's CLIP score is the cosine."""

    scale: str = field("The cosine, or exp(logit_scale) times it, divided.", COSINE, choices=SCALES)


def two_tower_encoder(
    name: str, options: ModelRewardOptions, networks: Networks, architecture: Files | None = None
) -> Encoder:
    """The encoder of a reward, which must read texts as well as images.

    Args:
        name: of the reward.
        options: of it.
        networks: that load the encoder.
        architecture: see `Networks.encoder`.

    Raises:
        ValueError: one without a text tower.
    """
    encoder = networks.encoder(name, options.model, architecture, options.tokenizer)
    if encoder.text_features is None:
        raise ValueError(
            f"The encoder {encoder.name!r} reads no text, so that the reward {name!r} cannot "
            "compare its images with prompts. Use a CLIP-like encoder."
        )
    return encoder


def cosine_reward(name: str, encoder: Encoder, scale: str = COSINE) -> Reward:
    """A reward that is the pair's cosine, or proportional to it.

    Args:
        name: of the reward.
        encoder: of two towers.
        scale: of `SCALES`.

    Raises:
        ValueError: a scale that the encoder does not have.
    """
    logit_scale = encoder.logit_scale
    if scale != COSINE and logit_scale is None:
        raise ValueError(
            f"The encoder {encoder.name!r} has no logit scale; use a CLIP-like model, or set "
            f"config.rewards.{name}.scale={COSINE}."
        )

    def score(variables: PyTree, images: Array, text: PyTree) -> Array:
        cosine = pair_cosine(encoder, variables, images, text)
        if scale == COSINE or logit_scale is None:
            return cosine
        return logit_scale(variables) * cosine / DIVISORS[scale]

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
    assert encoder.tokenizer is not None  # `two_tower_encoder` has seen to it
    tokenizer = encoder.tokenizer()
    limit = min(encoder.text_length, tokenizer.model_max_length)
    whole = tokenizer(list(texts), padding=False, truncation=False, verbose=False)
    too_long = [text for text, ids in zip(texts, whole["input_ids"]) if len(ids) > limit]
    if too_long:
        warnings.warn(
            f"{len(too_long)} of {len(texts)} prompts are longer than the {limit} tokens that "
            f"{encoder.name!r} reads, and are cut for its score; the first is "
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


@register("clip", ClipOptions)
def make(options: ClipOptions, networks: Networks) -> Reward:
    """The pair's cosine, on the scale that the options say."""
    return cosine_reward("clip", two_tower_encoder("clip", options, networks), options.scale)
