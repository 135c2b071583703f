"""The prompt set as rows on the host, ready to be gathered into a batch.

The text towers never train, so that each prompt is encoded once, before training; an iteration
then only picks rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from pec_jax.types import Batch, Conditioning

PyTree = Any


@runtime_checkable
class Embeddings(Protocol):
    """Text embeddings by row, in memory or on disk."""

    def __len__(self) -> int: ...

    def gather(self, rows: np.ndarray) -> Conditioning:
        """The embeddings of some rows [N], NumPy arrays."""
        ...


@dataclasses.dataclass(frozen=True)
class EmbeddingsInMemory:
    """Embeddings that were encoded at the start of the run."""

    conditioning: Conditioning  # [N, ...], NumPy arrays

    def __len__(self) -> int:
        return self.conditioning.tokens.shape[0]

    def gather(self, rows: np.ndarray) -> Conditioning:
        """The embeddings of some rows [N], NumPy arrays."""
        return jax.tree.map(lambda leaf: leaf[rows], self.conditioning)


@dataclasses.dataclass(frozen=True)
class PromptTable:
    """Everything the train step needs to know of each prompt, on the host.

    Attributes:
      embeddings: text embeddings, perhaps shared with other sets of prompts.
      rows: [N] the row of each prompt in `embeddings`.
      reward_inputs: reward name -> what its `prepare` returned, arrays [N, ...].
    """

    embeddings: Embeddings
    rows: np.ndarray
    reward_inputs: Mapping[str, PyTree]

    def __post_init__(self):
        inputs = jax.tree.map(np.asarray, dict(self.reward_inputs))
        size = len(self.rows)
        for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
            if leaf.ndim == 0 or leaf.shape[0] != size:
                raise ValueError(
                    f"Each of the {size} prompts needs one row, but {jax.tree_util.keystr(path)} "
                    f"has the shape {leaf.shape}."
                )
        object.__setattr__(self, "reward_inputs", inputs)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, ids: np.ndarray) -> Batch:
        """The rows of some prompts.

        Args:
          ids: [P] int in [0, N); repeats are allowed.

        Returns:
          A Batch of NumPy arrays [P, ...].

        Raises:
          IndexError: an id lies outside the table.
        """
        ids = np.asarray(ids, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(
                f"Prompt ids {ids.min()} to {ids.max()} in a table of {len(self)} prompts."
            )
        inputs = jax.tree.map(lambda leaf: leaf[ids], self.reward_inputs)
        # NumPy until the train step puts it on its devices.
        return Batch(ids, self.embeddings.gather(self.rows[ids]), inputs)  # type: ignore[arg-type]
