"""What a perceptual encoder is: decoded images to features, in the graph.

Its weights are loaded by `Networks`, onto the mesh; an encoder itself holds none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pec_jax.types import PyTree


def unit(features: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Features over their Euclidean norm, f / ||f||, whatever their size.

    A zero vector stays zero, with a finite gradient.
    """
    # The direction does not depend on this factor, which keeps squares from over- and underflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(features), axis=-1, keepdims=True))
    scaled = features / jnp.where(largest > 0, largest, 1.0)
    square = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)
    return scaled * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen image encoder, perhaps with a text tower in the same space. Static.

    Attributes:
        name: of its directory.
        network: key of its variables, see `Networks`; '' for none ({}).
        dim: d, the number of features.
        image_features: (variables, images [N, H, W, 3] in [0, 1]) -> [N, d] fp32, not normalised.
            Any H and W; resized as `preprocessor_config.json` says.
        text_features: (variables, token ids [N, L]) -> [N, d] fp32, not normalised; None for an
            encoder of images only.
        logit_scale: (variables) -> the factor of cosine similarities, exp of what is stored; None
            for an encoder of images only.
        tokenizer: loads a Hugging Face tokenizer, which images have no use for; None for an
            encoder of images only.
        text_length: L, tokens that it has positions for; 0 for an encoder of images only.
        text_modules: names of the modules that only texts go through.
        pair_features: (variables, (token ids, mask) [N, L] each, images [N, H, W, 3] in [0, 1]) ->
            [N, pair_dim] fp32, of each text as it looks at its image; None for an encoder that
            keeps the two apart.
        pair_dim: number of those features.
    """

    name: str
    network: str
    dim: int
    image_features: Callable[[PyTree, Array], Array]
    text_features: Callable[[PyTree, Array], Array] | None = None
    logit_scale: Callable[[PyTree], Array] | None = None
    tokenizer: Callable[[], Any] | None = None
    text_length: int = 0
    text_modules: tuple[str, ...] = ()
    pair_features: Callable[[PyTree, tuple[Array, Array], Array], Array] | None = None
    pair_dim: int = 0

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
        """Token ids of texts, padded and cut to the encoder's length, int32.

        Raises:
            ValueError: the encoder has no text tower.
        """
        return self.tokens(texts)[0]

    def tokens(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "n l"], Int[np.ndarray, "n l"]]:
        """Token ids and their mask, 0 at padding; as `tokenize`."""
        if self.tokenizer is None:
            raise ValueError(f"the encoder {self.name!r} takes images only, it has no text tower")
        tokenizer = self.tokenizer()
        encoded = tokenizer(
            list(texts),
            padding="max_length",
            max_length=min(self.text_length, tokenizer.model_max_length),
            truncation=True,
            return_attention_mask=True,
        )
        ids, mask = (np.asarray(encoded[k], np.int32) for k in ("input_ids", "attention_mask"))
        return ids, mask
