"""The prompt set as arrays on the host, ready to be gathered into a batch.

The text towers never train, so that each prompt is encoded once, before training; an iteration
then only picks rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pec_jax.types import Batch, Conditioning

PyTree = Any


@dataclasses.dataclass(frozen=True)
class PromptTable:
    """Everything the train step needs to know of each prompt, as NumPy arrays on the host.

    Attributes:
      conditioning: text embeddings, tokens [N, L, D] and pooled [N, Dp].
      reward_inputs: reward name -> what its `prepare` returned, arrays [N, ...].
    """

    conditioning: Conditioning
    reward_inputs: Mapping[str, PyTree]

    def __post_init__(self):
        host = jax.tree.map(np.asarray, (self.conditioning, dict(self.reward_inputs)))
        size = host[0].tokens.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(host):
            if leaf.ndim == 0 or leaf.shape[0] != size:
                raise ValueError(
                    f"Each of the {size} prompts needs one row, but {jax.tree_util.keystr(path)} "
                    f"has the shape {leaf.shape}."
                )
        object.__setattr__(self, "conditioning", host[0])
        object.__setattr__(self, "reward_inputs", host[1])

    def __len__(self) -> int:
        return self.conditioning.tokens.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory that the table takes on the host, bytes."""
        leaves = jax.tree.leaves((self.conditioning, self.reward_inputs))
        return sum(leaf.nbytes for leaf in leaves)

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
        conditioning, inputs = jax.tree.map(
            lambda leaf: leaf[ids], (self.conditioning, self.reward_inputs)
        )
        # NumPy until the train step puts it on its devices.
        return Batch(ids, conditioning, inputs)  # type: ignore[arg-type]
