"""Which prompts each iteration uses: a pure function of the seed and the iteration's number.

There is no iterator whose state could be lost: the number of the iteration is the cursor, so that
a resumed run sees exactly the prompts that an uninterrupted one would have seen.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


@dataclasses.dataclass(frozen=True)
class PromptStream:
    """Prompt ids by iteration: every epoch is a new shuffle, without replacement.

    Position p of the endless stream is prompt shuffle_e[p mod n] of epoch e = p // n; iteration i
    takes the positions [i G, (i + 1) G). Every process computes the same ids, and reads the rows of
    its own groups alone.

    Attributes:
      num_prompts: n, size of the prompt set.
      groups: G, prompts of one iteration over all processes.
      seed: of the shuffles.
    """

    num_prompts: int
    groups: int
    seed: int

    def __post_init__(self):
        if self.num_prompts < 1:
            raise ValueError(f"A prompt set needs at least one prompt, not {self.num_prompts}.")
        if self.groups < 1:
            raise ValueError(f"An iteration needs at least one group, not {self.groups}.")
        if self.seed < 0:
            raise ValueError(f"The seed of the prompt stream must not be negative: {self.seed}.")

    def ids(self, iteration: int) -> np.ndarray:
        """The prompts of an iteration over all processes.

        Args:
          iteration: from 0.

        Returns:
          [groups] int32 in [0, num_prompts); distinct within an epoch.
        """
        if iteration < 0:
            raise ValueError(f"Iterations count from 0, not from {iteration}.")
        positions = iteration * self.groups + np.arange(self.groups, dtype=np.int64)
        epochs, places = np.divmod(positions, self.num_prompts)
        shuffles = {int(e): _shuffle(self.seed, int(e), self.num_prompts) for e in set(epochs)}
        return np.array([shuffles[int(e)][p] for e, p in zip(epochs, places)], np.int32)


@functools.lru_cache(maxsize=4)
def _shuffle(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch, [size] int64; the last few are kept, as an epoch lasts long."""
    order = np.random.default_rng([seed, epoch]).permutation(size)
    order.flags.writeable = False
    return order


def repeat_groups(tree: PyTree, group_size: int) -> PyTree:
    """Repeats every prompt's row K times in place: the rows of a group stay neighbours.

    Args:
      tree: pytree of arrays [P, ...].
      group_size: K.

    Returns:
      The pytree with arrays [P * K, ...].
    """
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, group_size, axis=0), tree)
