"""The pytrees that travel between the parts of the program: shapes only, no maths.

Axis letters used everywhere: P prompts (groups) of one iteration, K images of each prompt,
N = P * K or any other flat batch, T sampler steps, S trained steps, L text tokens, D token width,
h, w, C latent height, width and channels (written `*latent` where nothing depends on their
number); H, W image height and width.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from flax import struct
from jaxtyping import Float

Array = jax.Array
PyTree = Any
Scalar = float | np.floating | Float[Array, ""]


@struct.dataclass
class Conditioning:
    """What a velocity model is conditioned on: the text, already encoded.

    A family that has no use for a field leaves it None, and it is then no leaf of the tree.
    """

    tokens: Array  # [..., L, D] text token embeddings
    pooled: Array | None = None  # [..., Dp] pooled text embedding
    mask: Array | None = None  # [..., L] bool, False at padding; None: padding is read as text


@struct.dataclass
class Batch:
    """The prompts of one iteration, as the host hands them to the train step."""

    prompt_ids: Array  # [P] int32, index into the prompt set
    conditioning: Conditioning  # [P, ...]
    reward_inputs: dict[str, PyTree]  # reward name -> arrays [P, ...]


@struct.dataclass
class Frozen:
    """Every array that does not learn."""

    transformer: PyTree  # linen variables of the base model
    vae: PyTree  # linen variables
    negative: Conditioning  # [1, ...] the empty prompt, for classifier-free guidance
    networks: dict[str, PyTree]  # key -> variables, of rewards and encoders; shared ones once


@struct.dataclass
class Transition:
    """Steps of N sampled paths, as they were taken."""

    x_t: Array  # [N, *latent] where they start
    x_next: Array  # [N, *latent] where they end
    sigma: Array  # scalar or [N]
    sigma_next: Array  # scalar or [N]


@struct.dataclass
class Trajectory:
    """One batch of sampled paths, in sampling order (noise to image).

    Only `x_0` is always there: an objective says whether it needs the paths.
    """

    x_0: Array  # [N, *latent] the final latents
    x_t: Array | None = None  # [T, N, *latent] the state a step starts from
    x_next: Array | None = None  # [T, N, *latent] the state it ends in
    logp: Array | None = None  # [T, N] log-density of x_next, mean over dimensions; 0 at ODE steps
    x_0_hat: Array | None = None  # [T, N, *latent] what each step predicts x_0 to be


@struct.dataclass
class Rollout:
    """One iteration's experience: paths, what their images were worth, how surprising they are."""

    trajectory: Trajectory  # with N = P * K
    rewards: Array  # [P, K] weighted sum of the rewards
    surprisal: Array  # [P, K] or [S, P, K] perceptual surprisal, nats per dimension


@struct.dataclass
class TrainState:
    """All that a run must remember; what a checkpoint holds."""

    step: Array  # int32, finished iterations
    params: PyTree  # trainable parameters (a LoRA tree, or the whole transformer)
    ema: PyTree  # exponential moving average of params
    opt_state: optax.OptState
    objective: dict[str, PyTree]  # what the objective remembers, trees like params
    constraints: dict[str, dict[str, Array]]  # name -> scalars: its weight, and the like
    skipped: Array  # int32, updates skipped in a row because something was not finite
