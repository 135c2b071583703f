"""CLIP score: how well an image fits its prompt, by the cosine of CLIP features.

CLIP: Radford et al. 2021, arXiv 2103.00020; as a score of generated images: Hessel et al. 2021,
arXiv 2104.08718 (without their factor of 2.5 and without their clipping at 0).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.data.prompts import Prompt
from pec_jax.distributed import processes as hosts
from pec_jax.perception.encoders import Encoder, unit
from pec_jax.rewards.base import Reward, as_8bit, register, reject_unknown_options

Array = jax.Array
PyTree = Any

TEXT_BATCH = 64  # prompts encoded at a time


def require_encoder(name: str, options: Mapping[str, Any]) -> Encoder:
    """The encoder among a reward's options, which must read texts as well as images.

    Raises:
      ValueError: no encoder given, one without a text tower, or other options besides.
    """
    reject_unknown_options(name, options, ("encoder",))
    encoder = options.get("encoder")
    if encoder is None:
        raise ValueError(f"The reward {name!r} needs the option 'encoder', a CLIP-like encoder.")
    if encoder.text_features is None:
        raise ValueError(
            f"The encoder {encoder.name!r} reads no text, so that the reward {name!r} cannot "
            "compare its images with prompts. Use a CLIP-like encoder."
        )
    return encoder


def tokenize(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Token ids, padded to the encoder's length; what is longer is cut, with one warning.

    Args:
      encoder: with a text tower.
      texts: N texts.

    Returns:
      [N, L] int32.
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


def text_features(encoder: Encoder, prompts: Sequence[Prompt]) -> np.ndarray:
    """Unit text features of a prompt set, once: texts do not change in training.

    Args:
      encoder: with a text tower.
      prompts: N prompts.

    Returns:
      [N, d] fp32 of length 1.
    """
    ids = tokenize(encoder, [prompt.text for prompt in prompts])
    tower = encoder.text_features
    assert tower is not None  # `require_encoder` has seen to it
    encode = jax.jit(lambda params, batch: unit(tower(params, batch)))
    # Whole batches only, so that one compilation serves them all.
    missing = -len(ids) % TEXT_BATCH
    padded = np.concatenate([ids, np.repeat(ids[-1:], missing, axis=0)])
    batches = padded.reshape(-1, TEXT_BATCH, ids.shape[1])
    features = [hosts.fetch(encode(encoder.params, batch)) for batch in batches]
    return np.concatenate(features)[: len(ids)]


def pair_cosine(encoder: Encoder, params: PyTree, images: Array, text: Array) -> Array:
    """Cosine of each image with its own prompt, never with another's.

    cos[p, k] = <f_image(images[p, k]), f_text(p)>, both of length 1.

    Args:
      encoder: whose image tower is used.
      params: of the encoder.
      images: [P, K, H, W, 3] in [0, 1]; rounded to 8 bits first.
      text: [P, d] unit text features.

    Returns:
      [P, K] fp32 in [-1, 1].
    """
    groups, size = images.shape[:2]
    flat = as_8bit(images).reshape(-1, *images.shape[2:])
    features = unit(encoder.image_features(params, flat)).reshape(groups, size, -1)
    return jnp.einsum("pkd,pd->pk", features, text, precision="highest")


@register("clip")
def make(options: Mapping[str, Any]) -> Reward:
    """The CLIP score as a reward: the pair's cosine, without the logit scale.

    Args:
      options: "encoder": an Encoder with a text tower.
    """
    encoder = require_encoder("clip", options)
    return Reward(
        name="clip",
        prepare=lambda prompts: text_features(encoder, prompts),
        score=lambda params, images, text: pair_cosine(encoder, params, images, text),
        params=encoder.params,
    )
