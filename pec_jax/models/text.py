"""From prompts to conditioning, as Stable Diffusion 3 does it: two CLIP towers and a T5 encoder.

    tokens = concat_L(pad_D(concat_D(clip_1, clip_2)), t5)
    pooled = concat_D(embeds_1, embeds_2)

where clip_i are hidden states before the last layer, padded with zeros to T5's width, and embeds_i
are the projected end-of-text features. No attention mask is used: padding is part of the input.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", figure 2; the details are those of diffusers' `StableDiffusion3Pipeline.encode_prompt`.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models.clip import CLIPTextModel
from pec_jax.models.t5 import T5Encoder
from pec_jax.types import Conditioning

Array = jax.Array
Tokenizer = Callable[..., Mapping[str, Any]]  # a Hugging Face tokenizer

# Tokens that SD3 gives T5 (which itself takes any number); more only cost time.
MAX_T5_LENGTH = 256


class TokenIds(NamedTuple):
    """The same prompts for each of the three encoders."""

    clip: Array | np.ndarray  # [N, L] int32
    clip_2: Array | np.ndarray  # [N, L] int32
    t5: Array | np.ndarray  # [N, M] int32


def join(clip: Array, clip_2: Array, t5: Array) -> Array:
    """Puts the three encoders' tokens into one sequence.

    Args:
        clip: hidden states of the first CLIP tower [N, L, D1].
        clip_2: hidden states of the second [N, L, D2].
        t5: hidden states of T5 [N, M, D], D >= D1 + D2.

    Returns:
        [N, L + M, D]: the CLIP tokens side by side and filled up with zeros, then those of T5.

    Raises:
        ValueError: the CLIP widths exceed T5's.
    """
    both = jnp.concatenate([clip, clip_2], axis=-1)
    missing = t5.shape[-1] - both.shape[-1]
    if missing < 0:
        raise ValueError(
            f"the CLIP text encoders are {clip.shape[-1]} + {clip_2.shape[-1]} wide, "
            f"more than T5's {t5.shape[-1]}"
        )
    both = jnp.pad(both, ((0, 0), (0, 0), (0, missing)))
    return jnp.concatenate([both, t5.astype(both.dtype)], axis=1)


def condition(
    variables: Mapping[str, Any],
    ids: TokenIds,
    *,
    clip: CLIPTextModel,
    clip_2: CLIPTextModel,
    t5: T5Encoder,
) -> Conditioning:
    """Runs the three encoders on tokenized prompts.

    Args:
        variables: of each encoder, under its name here.
        ids: tokenized prompts.
        clip: the first CLIP text tower, with projection.
        clip_2: the second.
        t5: the T5 encoder.

    Returns:
        Conditioning of N prompts, fp32 whatever the encoders compute in.
    """
    out: Any = clip.apply(variables["clip"], ids.clip)
    out_2: Any = clip_2.apply(variables["clip_2"], ids.clip_2)
    encoded: Any = t5.apply(variables["t5"], ids.t5)
    tokens = join(out.penultimate, out_2.penultimate, encoded)
    pooled = jnp.concatenate([out.text_embeds, out_2.text_embeds], axis=-1)
    return Conditioning(tokens.astype(jnp.float32), pooled.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("clip", "clip_2", "t5"))
def _condition(variables: Any, ids: TokenIds, **modules: Any) -> Conditioning:
    return condition(variables, ids, **modules)


@dataclasses.dataclass(frozen=True)
class TextStack:
    """Three tokenizers, three text encoders and their weights."""

    clip: CLIPTextModel
    clip_2: CLIPTextModel
    t5: T5Encoder
    variables: Mapping[str, Any]  # "clip", "clip_2", "t5" -> variables of the module
    tokenizers: tuple[Tokenizer, Tokenizer, Tokenizer]  # in the order of TokenIds
    clip_length: int  # tokens, of both CLIP towers
    t5_length: int  # tokens
    batch_size: int = 16  # prompts a call of the compiled function

    @property
    def num_tokens(self) -> int:
        """Length of the joint token sequence."""
        return self.clip_length + self.t5_length

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """Turns prompts into ids, padded and cut to each encoder's length.

        Warns once, however many prompts and encoders are concerned, if anything was cut off.

        Args:
            prompts: N prompts.

        Returns:
            ids of N prompts.
        """
        lengths = (self.clip_length, self.clip_length, self.t5_length)
        padded: list[np.ndarray] = []
        too_long: dict[str, None] = {}  # a set that remembers the order
        for tokenizer, length in zip(self.tokenizers, lengths):
            whole = tokenizer(list(prompts), verbose=False)["input_ids"]
            too_long.update({p: None for p, ids in zip(prompts, whole) if len(ids) > length})
            cut = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True
            )["input_ids"]
            padded.append(np.asarray(cut, np.int32))
        if too_long:
            warnings.warn(
                f"{len(too_long)} of {len(set(prompts))} prompts are longer than the text encoders "
                f"take (CLIP {self.clip_length} tokens, T5 {self.t5_length}) and were cut off "
                f"there; the first is {next(iter(too_long))!r}",
                stacklevel=2,
            )
        return TokenIds(*padded)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes prompts, in batches of one compiled size.

        Args:
            prompts: N prompts, at least one.

        Returns:
            Conditioning of NumPy arrays: tokens [N, L + M, D], pooled [N, D1 + D2], fp32.

        Raises:
            ValueError: no prompt at all.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        count = len(prompts)
        # Few sizes, so that one prompt does not pay for a whole batch and little is compiled.
        size = min(self.batch_size, 1 << (count - 1).bit_length())
        ids = self.tokenize(prompts)
        parts = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            chunk = jax.tree.map(lambda a, rows=rows: a[rows], ids)
            parts.append(jax.device_get(self._run(chunk)))
        return jax.tree.map(lambda *a: np.concatenate(a)[:count], *parts)

    def _run(self, ids: TokenIds) -> Conditioning:
        return _condition(self.variables, ids, clip=self.clip, clip_2=self.clip_2, t5=self.t5)
