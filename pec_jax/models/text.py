"""From prompts to conditioning, as Stable Diffusion 3 and FLUX.1 do it.

Stable Diffusion 3 has two CLIP towers and a T5 encoder:

    tokens = concat_L(pad_D(concat_D(clip, clip_2)), t5),  pooled = concat_D(embeds, embeds_2)

where clip are hidden states before the last layer, padded with zeros to T5's width, and embeds the
projected end-of-text features. FLUX.1 has one CLIP tower, of which it takes the end-of-text
feature only, and a T5 encoder:

    tokens = t5,  pooled = end_of_text(clip)

No attention mask is used: padding is part of the input.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", figure 2; the details are those of `encode_prompt` of diffusers' pipelines.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models.clip import CLIPTextModel
from pec_jax.models.t5 import T5Encoder
from pec_jax.types import Conditioning

Array = jax.Array
Tokenizer = Callable[..., Mapping[str, Any]]  # a Hugging Face tokenizer
TokenIds = dict[str, np.ndarray]  # tower -> [N, L] int32, the same prompts for each
Combine = Callable[[Mapping[str, Any]], Conditioning]  # outputs of the towers -> conditioning


def join(clip: Array, clip_2: Array, t5: Array) -> Array:
    """Puts the tokens of Stable Diffusion 3's encoders into one sequence.

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


def sd3_conditioning(t5_length: int, width: int) -> Combine:
    """Stable Diffusion 3's combination of "clip", "clip_2" and, if there is one, "t5".

    Args:
        t5_length: M, tokens of zeros that stand in the place of T5's where it is left out.
        width: D of those tokens.

    Returns:
        Outputs of the towers -> Conditioning, fp32 whatever the towers compute in.
    """

    def combine(outputs: Mapping[str, Any]) -> Conditioning:
        clip, clip_2 = outputs["clip"], outputs["clip_2"]
        t5 = outputs.get("t5")
        if t5 is None:
            t5 = jnp.zeros((clip.pooled.shape[0], t5_length, width))
        tokens = join(clip.penultimate, clip_2.penultimate, t5)
        pooled = jnp.concatenate([clip.text_embeds, clip_2.text_embeds], axis=-1)
        return Conditioning(tokens.astype(jnp.float32), pooled.astype(jnp.float32))

    return combine


def flux_conditioning(outputs: Mapping[str, Any]) -> Conditioning:
    """FLUX.1's combination of "clip" and "t5"; fp32 whatever the towers compute in."""
    return Conditioning(
        outputs["t5"].astype(jnp.float32), outputs["clip"].pooled.astype(jnp.float32)
    )


@dataclasses.dataclass(frozen=True)
class TextTower:
    """One text encoder, its weights and its tokenizer."""

    module: CLIPTextModel | T5Encoder
    variables: Any
    tokenizer: Tokenizer
    length: int  # tokens; prompts are padded and cut to this


@dataclasses.dataclass(frozen=True)
class TextStack:
    """The text encoders of a pipeline, and how their outputs become its conditioning."""

    towers: Mapping[str, TextTower]  # "clip", "clip_2", "t5"
    combine: Combine
    batch_size: int = 16  # prompts a call of the compiled function

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """Turns prompts into ids, padded and cut to each encoder's length.

        Warns once, however many prompts and encoders are concerned, if anything was cut off.

        Args:
            prompts: N prompts.

        Returns:
            Tower -> [N, L] int32.
        """
        ids: dict[str, np.ndarray] = {}
        too_long: dict[str, None] = {}  # a set that remembers the order
        for name, tower in self.towers.items():
            whole = tower.tokenizer(list(prompts), verbose=False)["input_ids"]
            too_long.update({p: None for p, row in zip(prompts, whole) if len(row) > tower.length})
            cut = tower.tokenizer(
                list(prompts), padding="max_length", max_length=tower.length, truncation=True
            )["input_ids"]
            ids[name] = np.asarray(cut, np.int32)
        if too_long:
            limits = ", ".join(f"{name} {tower.length}" for name, tower in self.towers.items())
            warnings.warn(
                f"{len(too_long)} of {len(set(prompts))} prompts have more tokens than the text "
                f"encoders take ({limits}) and were cut off there; the first is "
                f"{next(iter(too_long))!r}",
                stacklevel=2,
            )
        return ids

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes prompts, in batches of one compiled size.

        Args:
            prompts: N prompts, at least one.

        Returns:
            Conditioning of NumPy arrays: tokens [N, L, D], pooled [N, Dp], fp32.

        Raises:
            ValueError: no prompt at all.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        count = len(prompts)
        # Few sizes, so that one prompt does not pay for a whole batch and little is compiled.
        size = min(self.batch_size, 1 << (count - 1).bit_length())
        ids = self.tokenize(prompts)
        variables = {name: tower.variables for name, tower in self.towers.items()}
        parts = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            chunk = {name: a[rows] for name, a in ids.items()}
            parts.append(jax.device_get(self._run(variables, chunk)))
        return jax.tree.map(lambda *a: np.concatenate(a)[:count], *parts)

    @functools.cached_property
    def _run(self) -> Callable[[Any, TokenIds], Conditioning]:
        modules: dict[str, Any] = {name: tower.module for name, tower in self.towers.items()}

        def run(variables: Any, ids: TokenIds) -> Conditioning:
            return self.combine({n: m.apply(variables[n], ids[n]) for n, m in modules.items()})

        return jax.jit(run)
