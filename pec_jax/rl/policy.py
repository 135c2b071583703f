"""The policy: a velocity model, what of it learns, and how it draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float, Int, Key

from pec_jax.config.schema import TrainableConfig
from pec_jax.flow.sampler import FlowSampler, StepLogProb, Velocity, VelocityFn
from pec_jax.models import lora
from pec_jax.types import Conditioning, Frozen, PyTree, Trajectory, Transition

# (guidance scale, negative conditioning) -> velocity function
Guide = Callable[[float, Conditioning | None], VelocityFn]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Static; parameters and weights are arguments of its methods.

    Attributes:
        guide: how the model's velocity depends on the guidance scale.
        guidance: the scale in rollout and loss.
        trainable: what learns.
        sampler: how images are drawn.
        latent_shape: of one image.
    """

    guide: Guide
    guidance: float
    trainable: TrainableConfig
    sampler: FlowSampler
    latent_shape: tuple[int, ...]

    def at(self, iteration: Int[Array, ""], key: Key[Array, ""]) -> Policy:
        """The policy with the sampler of an iteration, see `FlowSampler.at`."""
        sampler = self.sampler.at(iteration, key)
        return self if sampler is self.sampler else dataclasses.replace(self, sampler=sampler)

    def before(self, frozen: Frozen, conditioning: Conditioning) -> Actor:
        """The policy before some prompts [N, ...]."""
        return Actor(self, frozen, conditioning)


@dataclasses.dataclass(frozen=True)
class Actor:
    """A policy before the prompts of N images; only the parameters are missing.

    Parameters of None are those of the base model: the reference policy.
    """

    policy: Policy
    frozen: Frozen
    conditioning: Conditioning

    def velocity(self, params: PyTree) -> Velocity:
        """(x_t [N, ...], sigma) -> v [N, ...]."""
        variables = self.frozen.transformer
        if params is not None:
            variables = bind(self.policy.trainable, params, variables)
        model = self.policy.guide(self.policy.guidance, self.frozen.negative)
        return lambda x_t, sigma: model(variables, x_t, sigma, self.conditioning)

    def sample(
        self,
        params: PyTree,
        x_1: Float[Array, "n ..."],
        keys: Key[Array, " n"],
        *,
        paths: bool = True,
        predictions: bool = False,
    ) -> Trajectory:
        """Draws images from noise, with their paths or without."""
        sampler, velocity = self.policy.sampler, self.velocity(params)
        if not paths:
            return Trajectory(x_0=sampler.final(velocity, x_1, keys))
        return sampler.sample(velocity, x_1, keys, keep_predictions=predictions)

    def log_prob(self, params: PyTree, taken: Transition) -> StepLogProb:
        """What the policy of `params` says of steps already taken."""
        return self.policy.sampler.log_prob(self.velocity(params), taken)


def bind(trainable: TrainableConfig, params: PyTree, transformer: PyTree) -> PyTree:
    """The transformer's variables with the trainable parameters in place.

    Args:
        trainable: whether `params` replaces the weights or is a LoRA beside them.
        params: what learns.
        transformer: linen variables of the base model.
    """
    if trainable.mode == "full":
        return {**transformer, "params": params}
    return {**transformer, "lora": lora.scaled(params, trainable.alpha, trainable.rank)}
