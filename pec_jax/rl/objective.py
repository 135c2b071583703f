"""What an objective is: how a rollout becomes a loss.

Adding one is one file in `rl/objectives/` (or a user's own, given by --plugin): a dataclass of
options, a class with the methods of `Objective`, and `register(ObjectiveDefinition(...))`. It is
called in this order:

    initial_state   what it remembers beside the policy, e.g. an old policy
    rollout_params  whose images are drawn
    samples         what of the rollout the loss looks at
    prepare         what the first update must see of the old policy, once per rollout
    evaluate        the policy on a micro-batch: signals, and what `losses` needs
    losses          the loss of each sample of it
    next_state      what it remembers after the updates
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float

from pec_jax.config.registry import OBJECTIVES
from pec_jax.flow.sampler import FlowSampler
from pec_jax.rl.policy import Actor, Policy
from pec_jax.rl.signals import PerSample, Signals
from pec_jax.types import PyTree, Rollout, TrainState


@struct.dataclass
class Samples:
    """What a loss looks at.

    Attributes:
        steps: arrays [S, ...], one entry per trained step.
        taken: arrays [S, N, ...] of each image at each step.
        images: arrays [N, ...] of each image.
    """

    steps: PyTree
    taken: PyTree
    images: PyTree


@struct.dataclass
class Micro:
    """Some images of every group at one step; N = P * k.

    Attributes:
        step: of `Samples.steps`, [...].
        taken: of `Samples.taken`, [N, ...].
        images: of `Samples.images`, [N, ...].
        rewards: [P, k].
        old: what `prepare` gave, [P, k, ...].
        first: whether this is the first update after the rollout, when the policy is still the
            one that drew the images.
    """

    step: PyTree
    taken: PyTree
    images: PyTree
    rewards: Float[Array, "p k"]
    old: PyTree
    first: Bool[Array, ""]


class Objective(abc.ABC):
    """The base class; a method that is not overridden does nothing.

    Attributes:
        provides: the signals marked * that `evaluate` can fill.
        needs_paths: whether the rollout must keep its states and log-probs.
        metrics_of_first: metrics of which the first update's is logged, and the maximum over its
            micro-batches; of all others the mean.
    """

    provides: frozenset[str] = frozenset()
    needs_paths: bool = True
    metrics_of_first: tuple[str, ...] = ()

    def __init__(self, options: Any):
        self.options = options

    def check(self, sampler: FlowSampler) -> None:  # noqa: B027  # a hook that may stay as it is
        """Raises ConfigError for a sampler whose policy this objective cannot train."""

    def initial_state(self, params: PyTree) -> dict[str, PyTree]:
        """What it remembers: trees like `params`, by name."""
        return {}

    def rollout_params(self, state: TrainState) -> PyTree:
        """The parameters that draw the images."""
        return state.params

    @abc.abstractmethod
    def samples(self, policy: Policy, rollout: Rollout, key: Array) -> Samples:
        """What of the rollout the loss looks at."""

    def prepare(self, actor: Actor, params: PyTree, micro: Micro) -> PyTree:
        """What later updates must know of the policy before the first one, [P, k, ...] each.

        Called with the samples of later updates alone, in the update's own graph, for the rollout's
        rounds differently.
        """
        return ()

    @abc.abstractmethod
    def evaluate(
        self, actor: Actor, params: PyTree, micro: Micro, state: dict[str, PyTree], needs: set[str]
    ) -> tuple[dict[str, Any], PyTree, dict[str, Array]]:
        """The policy on a micro-batch.

        Args:
            actor: the policy before the prompts of the micro-batch.
            params: what to differentiate with respect to.
            micro: the micro-batch.
            state: what the objective remembers.
            needs: the signals that constraints read.

        Returns:
            Fields of `Signals`, whatever `losses` needs, and metrics.
        """

    @abc.abstractmethod
    def losses(
        self, view: PyTree, signals: Signals, bounds: Callable[[float, float], tuple[float, float]]
    ) -> tuple[PerSample, dict[str, Float[Array, ""]]]:
        """The loss of each sample [P, k], and metrics.

        Args:
            view: from `evaluate`.
            signals: with the advantages.
            bounds: clip bounds as constraints move them.
        """

    def next_state(
        self, state: dict[str, PyTree], params: PyTree, updates: Array
    ) -> dict[str, PyTree]:
        """What it remembers after an iteration, given the new parameters and all updates so far."""
        return state


@dataclasses.dataclass(frozen=True)
class ObjectiveDefinition:
    """An objective as a config knows it: its name, its section, and the class that makes it."""

    name: str
    label: str
    options: type
    make: Callable[[Any], Objective]

    @property
    def origin(self) -> str:
        """The module that defines it."""
        return self.options.__module__


def register(definition: ObjectiveDefinition) -> ObjectiveDefinition:
    """Makes an objective known to configs; see `config.registry`."""
    return OBJECTIVES.register(definition)
