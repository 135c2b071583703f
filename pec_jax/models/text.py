"""Text encoders side by side: prompts to tokens, and tokens to conditioning, in batches.

How the encoders' outputs become one conditioning is the family's business (`families/`).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pec_jax.types import Conditioning

Tokenizer = Callable[..., Mapping[str, Any]]  # a Hugging Face tokenizer


class Tokens(NamedTuple):
    """Prompts as one tower reads them."""

    ids: np.ndarray  # [N, L] int32
    mask: np.ndarray  # [N, L] bool, False where the prompt was padded


# (outputs of the towers, masks [N, L] of their tokens) -> conditioning, by name of the tower
Combine = Callable[[Mapping[str, Any], Mapping[str, Any]], Conditioning]


@dataclasses.dataclass(frozen=True)
class TextTower:
    """One text encoder, its weights and its tokenizer."""

    module: Any  # ids [N, L] int32 (and mask [N, L] bool, where it is masked) -> output
    variables: Any
    tokenizer: Tokenizer
    length: int  # tokens; prompts are padded and cut to this
    masked: bool = False  # whether the module takes the mask

    def cut_to(self, length: int) -> TextTower:
        """The same tower with prompts of another length, in tokens."""
        return dataclasses.replace(self, length=length)


@dataclasses.dataclass(frozen=True)
class TextStack:
    """The text encoders of a pipeline, and how their outputs become its conditioning."""

    towers: Mapping[str, TextTower]  # such as "clip", "clip_2" and "t5"
    combine: Combine
    batch_size: int = 16  # prompts per call of the compiled function

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tokens]:
        """Turns prompts into ids, padded and cut to each encoder's length.

        Warns once, however many prompts and encoders are concerned, if anything was cut off.

        Args:
            prompts: N prompts.

        Returns:
            Tower -> tokens [N, L].
        """
        tokens: dict[str, Tokens] = {}
        too_long: dict[str, None] = {}  # a set that remembers the order
        for name, tower in self.towers.items():
            whole = tower.tokenizer(list(prompts), verbose=False)["input_ids"]
            too_long.update({p: None for p, row in zip(prompts, whole) if len(row) > tower.length})
            cut = tower.tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tower.length,
                truncation=True,
                return_attention_mask=True,
            )
            tokens[name] = Tokens(
                np.asarray(cut["input_ids"], np.int32), np.asarray(cut["attention_mask"], bool)
            )
        if too_long:
            limits = ", ".join(f"{name} {tower.length}" for name, tower in self.towers.items())
            warnings.warn(
                f"{len(too_long)} of {len(set(prompts))} prompts have more tokens than the text "
                f"encoders take ({limits}) and were cut off there; the first is "
                f"{next(iter(too_long))!r}",
                stacklevel=2,
            )
        return tokens

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes prompts, in batches of one compiled size.

        Args:
            prompts: N prompts, at least one.

        Returns:
            Conditioning of NumPy arrays [N, ...], fp32 but for the mask.

        Raises:
            ValueError: no prompt at all.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        count = len(prompts)
        # Few sizes, so that one prompt does not pay for a whole batch and little is compiled.
        size = min(self.batch_size, 1 << (count - 1).bit_length())
        tokens = self.tokenize(prompts)
        variables = {name: tower.variables for name, tower in self.towers.items()}
        parts = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            chunk = jax.tree.map(lambda a: a[rows], tokens)  # noqa: B023
            parts.append(jax.device_get(self._run(variables, chunk)))
        return jax.tree.map(lambda *a: np.concatenate(a)[:count], *parts)

    @functools.cached_property
    def _run(self) -> Callable[[Any, dict[str, Tokens]], Conditioning]:
        towers = self.towers

        def run(variables: Any, tokens: dict[str, Tokens]) -> Conditioning:
            outputs = {
                name: tower.module.apply(
                    variables[name], *(tokens[name] if tower.masked else tokens[name][:1])
                )
                for name, tower in towers.items()
            }
            return self.combine(outputs, {name: tokens[name].mask for name in towers})

        return jax.jit(run)
