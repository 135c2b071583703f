"""The weighted sum of the rewards of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.perception.networks import Networks
from pec_jax.rewards.base import Measures, Reward
from pec_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class CombinedReward:
    """R = sum_i weight_i R_i.

    Attributes:
        rewards: name -> Reward.
        weights: name -> factor; a reward of weight 0 is only measured.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]

    def trained(self) -> CombinedReward:
        """Those of weight other than 0."""
        kept = {name: weight for name, weight in self.weights.items() if weight}
        return CombinedReward({name: self.rewards[name] for name in kept}, kept)

    def prepare(
        self, networks: Mapping[str, PyTree], prompts: Sequence[Prompt]
    ) -> dict[str, PyTree]:
        """Name -> arrays [N, ...] of that reward; on the host, once per prompt set."""
        return {
            name: reward.prepare(variables_of(reward, networks), prompts)
            for name, reward in self.rewards.items()
        }

    def score(
        self,
        networks: Mapping[str, PyTree],
        images: Float[Array, "p k h w 3"],
        inputs: Mapping[str, PyTree],
    ) -> tuple[Float[Array, "p k"], dict[str, Float[Array, "p k"]]]:
        """Judges the images of P groups.

        Args:
            networks: key -> variables.
            images: in [0, 1].
            inputs: as `prepare` returns them, rows of the P prompts.

        Returns:
            The weighted sum, and each reward by itself, unweighted.

        Raises:
            ValueError: a reward returned something that is not [P, K].
        """
        return self.finish(self.start(networks, images, inputs))

    def start(
        self,
        networks: Mapping[str, PyTree],
        images: Float[Array, "p k h w 3"],
        inputs: Mapping[str, PyTree],
    ) -> dict[str, Array]:
        """The scores [P, K] of rewards in the graph, and tickets [P, K] of those on the host, which
        begin to judge; arguments and errors as of `score`.
        """
        return {
            name: self._start(reward, variables_of(reward, networks), images, inputs[name])
            for name, reward in self.rewards.items()
        }

    def finish(
        self, started: Mapping[str, Array]
    ) -> tuple[Float[Array, "p k"], dict[str, Float[Array, "p k"]]]:
        """What `score` returns, once all judges on the host have answered."""
        parts = {}
        for name, found in started.items():
            job = self.rewards[name].job
            parts[name] = found if job is None else job.finish(found)
        # Weight 0 leaves a reward out altogether, for 0 * nan would spoil the sum.
        terms = [self.weights[name] * parts[name] for name in parts if self.weights[name]]
        zeros = jnp.zeros(next(iter(parts.values())).shape, jnp.float32)
        return sum(terms, zeros), parts

    def measure(
        self,
        networks: Mapping[str, PyTree],
        images: Float[Array, "p k h w 3"],
        inputs: Mapping[str, PyTree],
    ) -> Measures:
        """What each reward publishes in an evaluation, unweighted; arguments as of `score`."""
        scores: dict[str, Array] = {}
        diversities: dict[str, Array] = {}
        for name, reward in self.rewards.items():
            variables = variables_of(reward, networks)
            if reward.measure is None:
                scores[name] = self._score(reward, variables, images, inputs[name])
            else:
                measured = reward.measure(variables, images, inputs[name])
                scores |= measured.scores
                diversities |= measured.diversities
        return Measures(scores, diversities)

    def _start(self, reward: Reward, variables: PyTree, images: Array, inputs: PyTree) -> Array:
        if reward.job is None:
            return self._score(reward, variables, images, inputs)
        return reward.job.start(images, inputs)

    def _score(self, reward: Reward, variables: PyTree, images: Array, inputs: PyTree) -> Array:
        part = reward.score(variables, images, inputs)
        if part.shape != images.shape[:2]:
            raise ValueError(
                f"The reward {reward.name!r} returned an array of shape {part.shape}; "
                f"expected one number per image, {images.shape[:2]}."
            )
        return part.astype(jnp.float32)


def variables_of(reward: Reward, networks: Mapping[str, PyTree]) -> PyTree:
    """The variables a reward asks for."""
    if isinstance(reward.network, tuple):
        return tuple(networks[key] for key in reward.network)
    return networks[reward.network] if reward.network else {}


def make_rewards(sections: Mapping[str, Any], networks: Networks) -> CombinedReward:
    """The rewards that a config trains on or evaluates.

    Args:
        sections: name -> options of all rewards.
        networks: which loads what they need.

    Raises:
        ValueError: as the definitions say; the message names the reward.
    """
    used = {name: o for name, o in sections.items() if o.weight != 0 or o.evaluate}
    return CombinedReward(
        {name: REWARDS[name].make(options, networks) for name, options in used.items()},
        {name: options.weight for name, options in used.items()},
    )
