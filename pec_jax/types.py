"""The pytrees that travel between the parts of the program: shapes only, no maths.

Axis letters used everywhere: P prompts (groups) of one iteration, K images of each prompt,
N = P * K or any other flat batch, T sampler steps, L text tokens, D token width,
h, w, C latent height, width and channels; H, W image height and width.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import struct

Array = jax.Array
PyTree = Any


@struct.dataclass
class Conditioning:
    """What a velocity model is conditioned on: the text, already encoded.

    A family that has no use for a field leaves it None, and it is then no leaf of the tree.
    """

    tokens: Array  # [..., L, D] text token embeddings
    pooled: Array | None = None  # [..., Dp] pooled text embedding
    mask: Array | None = None  # [..., L] bool, False at padding; None: padding is read as text

    def reshape_leading(self, *leading: int, ndim: int = 1) -> Conditioning:
        """Replaces the first `ndim` axes by `leading`."""
        return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[ndim:]), self)


@struct.dataclass
class Batch:
    """The prompts of one iteration, as the host hands them to the train step."""

    prompt_ids: Array  # [P] int32, index into the prompt set
    conditioning: Conditioning  # [P, ...]
    reward_inputs: dict[str, PyTree]  # reward name -> arrays [P, ...]


@struct.dataclass
class Trajectory:
    """Every step of one batch of sampled paths, in sampling order (noise to image)."""

    x_t: Array  # [T, N, h, w, C] the state a step starts from
    x_next: Array  # [T, N, h, w, C] the state it ends in
    logp: Array  # [T, N] log-density of x_next, mean over dimensions; 0 at ODE steps
    x_0: Array  # [N, h, w, C] the final latents
    x_0_hat: Array | None = None  # [T, N, h, w, C] what each step predicts x_0 to be


@struct.dataclass
class Rollout:
    """One iteration's experience: trajectories, what they were worth, how surprising."""

    trajectory: Trajectory  # with N = P * K
    rewards: Array  # [P, K] weighted sum of the rewards
    surprisal: Array  # [P, K] or [S, P, K] perceptual surprisal, nats per dimension
    metrics: dict[str, Array]  # scalars to log


@struct.dataclass
class TrainState:
    """All that a run must remember; what a checkpoint holds."""

    step: Array  # int32, finished iterations
    params: PyTree  # trainable parameters (a LoRA tree, or the whole transformer)
    ema: PyTree  # exponential moving average of params
    opt_state: optax.OptState
    constraint_weight: Array  # fp32, lambda: constant, or the dual variable
    entropy_target: Array  # fp32, H* of the dual variable, nats per dimension; else 0
    skipped: Array  # int32, updates skipped in a row because something was not finite
