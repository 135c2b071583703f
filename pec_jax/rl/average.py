"""The average of the parameters that evaluations and exports use."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pec_jax.config.schema import OptimizerConfig
from pec_jax.types import PyTree, Scalar


@dataclasses.dataclass(frozen=True)
class Average:
    """An exponential moving average, ema <- d^r ema + (1 - d^r) params every so many updates.

    Flow-GRPO's code moves it after each micro-batch in which the count of updates n satisfies
    (n + 1) mod 8 = 0, with d = min((1 + n) / (10 + n), .9): `every` is 8 there, and `repeats` the
    number of micro-batches of an update on one device.

    Attributes:
        decay: d in [0, 1], or its bound.
        every: updates from one move to the next.
        repeats: r, moves at a time.
        warmup: whether d is at most (1 + n) / (10 + n).

    Source: yifan123/flow_grpo@1f4ca40: scripts/train_sd3.py, and flow_grpo/ema.py.
    """

    decay: float
    every: int = 1
    repeats: int = 1
    warmup: bool = False

    @classmethod
    def from_config(cls, config: OptimizerConfig) -> Average:
        """As a run has it."""
        return cls(config.ema_decay, config.ema_every, config.ema_repeats, config.ema_warmup)

    def moved(self, ema: PyTree, params: PyTree, updates: Array) -> PyTree:
        """The average after an update.

        Args:
            ema: before it.
            params: after it.
            updates: n, all updates so far, this one included.
        """
        decay: Scalar = self.decay
        if self.warmup:
            decay = jnp.minimum((1.0 + updates) / (10.0 + updates), decay)
        new = optax.incremental_update(params, ema, 1 - decay**self.repeats)
        if self.every == 1:
            return new
        moves = (updates + 1) % self.every == 0
        return jax.tree.map(lambda n, o: jnp.where(moves, n, o), new, ema)
