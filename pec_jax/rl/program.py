"""What a train step is made of: its static half, its frozen arrays, and its first state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from pec_jax.config.schema import Config, TrainableConfig
from pec_jax.distributed import mesh as sharding
from pec_jax.distributed.mesh import Placement
from pec_jax.families.base import Guide
from pec_jax.flow.transition import schedule_stds
from pec_jax.models import lora
from pec_jax.rewards.base import CombinedReward
from pec_jax.rl.constraints import Constraint
from pec_jax.rl.signals import Options
from pec_jax.types import Array, Conditioning, PyTree, TrainState


@struct.dataclass
class Frozen:
    """Every array that does not learn."""

    transformer: PyTree  # linen variables of the base model
    vae: PyTree  # linen variables
    negative: Conditioning  # [1, ...] the empty prompt, for classifier-free guidance
    encoders: dict[str, PyTree]  # encoder name -> params
    rewards: dict[str, PyTree]  # reward name -> params, where they are not an encoder's

    def reward_params(self, reward_encoder: Mapping[str, str]) -> dict[str, PyTree]:
        """Reward name -> params; an encoder that also serves perception is held only once."""
        return {
            name: self.encoders[encoder] if encoder else self.rewards[name]
            for name, encoder in reward_encoder.items()
        }


@dataclasses.dataclass(frozen=True)
class Program:
    """The static half of a train step."""

    config: Config
    guide: Guide  # (guidance scale, negative conditioning) -> velocity function
    decode: Callable[[PyTree, Array], Array]  # (vae, latents [N, h, w, C]) -> [N, H, W, 3]
    features: dict[str, Callable[[PyTree, Array], Array]]  # encoder -> images [N, ...] -> [N, d]
    spaces: dict[str, float]  # encoders the perceptual entropy is measured with, and their shares
    surprisal: Callable[[Mapping[str, Array]], Array]  # {encoder: [..., P, K, d]} -> [..., P, K]
    reward: CombinedReward  # those of non-zero weight, which training looks at
    reward_encoder: dict[str, str]  # reward name -> the encoder whose params it uses, or ""
    constraint: Constraint
    optimizer: optax.GradientTransformation
    sigmas: np.ndarray  # [T + 1]
    stochastic: tuple[bool, ...]  # [T]
    latent_shape: tuple[int, ...]  # of one image, such as (h, w, C)

    @property
    def trained_steps(self) -> np.ndarray:
        """Indices [S] of the steps that are stochastic, and therefore trained."""
        return np.flatnonzero(self.stochastic)

    def step_std(self) -> Array:
        """Std [S] of the policy at the trained steps; it depends on the schedule alone."""
        sampler = self.config.sampler
        return schedule_stds(self.sigmas, sampler.kernel, sampler.noise_level)[self.trained_steps]


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


def constraint_options(config: Config) -> Options:
    """The constraint's options as its hooks read them."""
    c = config.constraint
    return Options(
        space=c.space,
        unit=c.unit,
        clip_ratio=c.clip_ratio,
        cov_band=(c.cov_band[0], c.cov_band[1]),
        cov_share=c.cov_share,
        kl_as=c.kl_as,
        gradient=c.gradient,
        rate=c.rate,
    )


def state_shardings(program: Program, params: PyTree, axes: PyTree, place: Placement) -> TrainState:
    """Where the state of a run lies: a TrainState of shardings.

    Args:
      program: whose optimizer's state it is.
      params: what learns, arrays or abstract.
      axes: the logical axes of each of them.
      place: from `sharding.placement`.
    """
    state = jax.eval_shape(lambda p: initial_state(p, program.optimizer, 0.0), params)
    return sharding.state_shardings(state, axes, program.optimizer, place)


def initial_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    constraint_weight: float,
    entropy_target: float = 0.0,
) -> TrainState:
    """The state of a run that has not begun; copies, for the step takes its buffers over."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        constraint_weight=jnp.asarray(constraint_weight, jnp.float32),
        entropy_target=jnp.asarray(entropy_target, jnp.float32),
        skipped=jnp.zeros((), jnp.int32),
    )
