"""The sampler: noise to image in one lax.scan, and the log-prob of a step it has taken.

Rollout and update share `_transition` and `_score`: a step is scored by the same code that took
it. x_next is rounded to the storage type before its log-prob is taken, since the rounded value
is the one the update will read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from pec_jax.flow.transition import (
    get_kernel,
    log_prob,
    ode,
    schedule_stds,
    squared_error,
    velocity_gains,
)
from pec_jax.flow.window import Motion
from pec_jax.types import Conditioning, PyTree, Trajectory, Transition

GAUSSIAN, SQUARED_ERROR = "gaussian", "squared_error"

# (x_t [N, ...], sigma (scalar or [N])) -> v [N, ...]: a model with its weights and prompts in place
Velocity = Callable[[Array, Array], Array]
# (variables, x_t [N, ...], sigma (scalar or [N]), conditioning [N, ...]) -> v [N, ...]
VelocityFn = Callable[[PyTree, Array, Array, Conditioning], Array]


class StepLogProb(NamedTuple):
    """What a policy says of steps already taken; float32."""

    logp: Float[Array, " n"]  # log-density, mean over dimensions; 0 where the step had no noise
    mean: Float[Array, "n ..."]  # of the kernel
    std: Float[Array, "..."]  # of the kernel; broadcasts with the mean


def guided(velocity_fn: VelocityFn, scale: float, negative: Conditioning | None) -> VelocityFn:
    """Classifier-free guidance, both branches in one doubled batch.

    v = v_neg + scale (v_pos - v_neg)

    Args:
        velocity_fn: the model.
        scale: guidance scale; at 1 the model itself is returned and nothing is doubled.
        negative: what to steer away from (as a rule the empty prompt); its arrays broadcast
            against those of the conditioning, so [L, D], [1, L, D] and [N, L, D] all do.

    Returns:
        A velocity function for [N, ...] that calls `velocity_fn` once with [2 N, ...].

    Raises:
        ValueError: for a scale other than 1 without a negative conditioning.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6, in the form diffusers uses.
    """
    if scale == 1:
        return velocity_fn
    if negative is None:
        raise ValueError(f"Guidance scale {scale} needs a negative conditioning; 1 needs none.")

    def velocity(variables, x_t, sigma, conditioning):
        def both(positive, other):  # [N, ...] twice -> [2 N, ...]
            # Interleaved and not end to end: of a batch sharded over devices, the two halves
            # of an image stay on one device and nothing moves.
            pair = jnp.stack([jnp.broadcast_to(other, positive.shape), positive], axis=1)
            return pair.reshape(-1, *positive.shape[1:])

        sigma = jnp.asarray(sigma)
        doubled = velocity_fn(
            variables,
            both(x_t, x_t),
            both(sigma, sigma) if sigma.ndim else sigma,
            jax.tree.map(both, conditioning, negative),
        )
        doubled = doubled.astype(jnp.float32).reshape(-1, 2, *doubled.shape[1:])
        v_neg, v_pos = doubled[:, 0], doubled[:, 1]
        return v_neg + scale * (v_pos - v_neg)

    return velocity


@dataclasses.dataclass(frozen=True, eq=False)
class FlowSampler:
    """How a path goes from noise to image: all that rollout and update must agree on.

    Attributes:
        sigmas: [T + 1] float32 from 1 to 0.
        kernel: of the stochastic steps, by name; the others follow the ODE.
        noise_level: as the kernel takes it.
        stochastic: [T] which steps are stochastic, and trained; () is none. Where they move, those
            of the first iteration.
        motion: how they move from iteration to iteration; None where they stay.
        offset: steps that they have moved by, see `at`.
        storage_dtype: of the states. Each is rounded to it before anything else reads it.
        noise_everywhere: where any step is stochastic, the others draw noise as well, though they
            are not trained.
        log_density: of a step, "gaussian", or "squared_error" as Flow-GRPO has it for `cps`.

    Raises:
        ValueError: `stochastic` and `sigmas` disagree about T, or there is no such kernel.
    """

    sigmas: np.ndarray
    kernel: str = "ode"
    noise_level: float = 0.0
    stochastic: tuple[bool, ...] = ()
    storage_dtype: Any = jnp.float32
    noise_everywhere: bool = False
    log_density: str = GAUSSIAN
    motion: Motion | None = None
    offset: ArrayLike = 0

    def __post_init__(self) -> None:
        get_kernel(self.kernel)
        if self.stochastic and len(self.stochastic) != self.num_steps:
            raise ValueError(
                f"stochastic names {len(self.stochastic)} steps, but {len(self.sigmas)} sigmas "
                f"make {self.num_steps}."
            )

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    @property
    def trained_steps(self) -> Int[np.ndarray | Array, " s"]:
        """Indices [S] of the stochastic steps."""
        return np.flatnonzero(self.stochastic) + self.offset

    @property
    def reached_steps(self) -> np.ndarray:
        """Indices of the steps that are trained in some iteration."""
        places = self.motion.places if self.motion else 1
        first = np.flatnonzero(self.stochastic)
        return np.unique(first[:, None] + np.arange(places))

    def step_std(self, steps: Int[np.ndarray | Array, " s"] | None = None) -> Float[Array, " s"]:
        """Std of the policy at some steps, those trained by default; the schedule decides it."""
        stds = schedule_stds(self.sigmas, self.kernel, self.noise_level)
        return stds[self.trained_steps if steps is None else steps]

    def uneven_gain(self) -> float:
        """The largest gain of the steps that are trained, over their median (of two, the lesser).

        The gain is that of the log-density in use: `velocity_gains`, times std^2 (and a constant)
        of the squared error. All of these steps must have noise.
        """
        steps = self.reached_steps
        gains = velocity_gains(self.sigmas, self.kernel, self.noise_level)[steps]
        if self.log_density == SQUARED_ERROR:
            gains = gains * jnp.square(self.step_std(steps))
        ordered = jnp.sort(gains)
        return float(ordered[-1] / ordered[(len(ordered) - 1) // 2])

    def at(self, iteration: Int[Array, ""], key: Key[Array, ""]) -> FlowSampler:
        """The sampler of an iteration; itself where the trained steps stay.

        Args:
            iteration: counted from 0.
            key: of the run.
        """
        if self.motion is None:
            return self
        return dataclasses.replace(self, offset=self.motion.offset(iteration, key))

    def time_factor(self, taken: Transition) -> Array:
        """dt of a step, which the variance of an SDE's kernel has as a factor; -1 for `cps`."""
        if self.kernel == "cps":
            return -jnp.ones_like(taken.sigma)
        return taken.sigma_next - taken.sigma

    def sample(
        self,
        velocity: Velocity,
        x_1: Float[Array, "n ..."],
        key: Key[Array, "..."],
        *,
        keep_predictions: bool = False,
    ) -> Trajectory:
        """Samples paths from noise to image, with the log-prob of every stochastic step.

        Args:
            velocity: the model, guided or not.
            x_1: unit Gaussian noise.
            key: the only source of noise; one, or [N], one per image (see `image_keys`).
            keep_predictions: fill x_0_hat = x_t - sigma v, float32, of every step.

        Returns:
            The trajectory: states in storage_dtype, logp float32 (0 at ODE steps), x_0 float32.
        """
        advance, xs = self._prepare(velocity, key)

        def step(x_t, x):
            x_next, logp, x_0_hat = advance(x_t, x)
            return x_next, (x_next, logp, x_0_hat if keep_predictions else None)

        x_1 = x_1.astype(self.storage_dtype)
        x_0, (x_next, logp, x_0_hat) = jax.lax.scan(step, x_1, xs)
        x_t = jnp.concatenate([x_1[None], x_next[:-1]])
        return Trajectory(
            x_t=x_t, x_next=x_next, logp=logp, x_0=x_0.astype(jnp.float32), x_0_hat=x_0_hat
        )

    def final(
        self, velocity: Velocity, x_1: Float[Array, "n ..."], key: Key[Array, "..."] | None
    ) -> Float[Array, "n ..."]:
        """The final latents, float32, without keeping the paths.

        Args: as for `sample`; without stochastic steps `key` is not read and may be None.
        """
        advance, xs = self._prepare(velocity, key)

        def step(x_t, x):
            return advance(x_t, x)[0], None

        x_0 = jax.lax.scan(step, x_1.astype(self.storage_dtype), xs)[0]
        return x_0.astype(jnp.float32)

    def log_prob(self, velocity: Velocity, taken: Transition) -> StepLogProb:
        """What the policy that `velocity` belongs to says of steps already taken.

        Args:
            velocity: the model, guided as it was in the rollout.
            taken: steps of N paths.
        """
        mean, std, _ = self._transition(velocity, taken.x_t, taken.sigma, taken.sigma_next)
        return StepLogProb(self._score(taken.x_next, mean, std), mean, std)

    def _prepare(self, velocity: Velocity, key: Array | None) -> tuple[Callable, tuple]:
        """One step as a function of its state and of the scan's inputs, and those inputs."""
        noisy_steps = self.stochastic or (False,) * self.num_steps
        if self.noise_everywhere and any(noisy_steps):
            noisy_steps = (True,) * self.num_steps
        sigmas = jnp.asarray(self.sigmas, jnp.float32)
        noisy = jnp.asarray(noisy_steps)
        if self.motion:
            noisy = jnp.roll(noisy, self.offset)
        xs = (jnp.arange(self.num_steps), sigmas[:-1], sigmas[1:], noisy)

        def advance(x_t, x):
            step, sigma, sigma_next, noisy = x
            mean, std, v = self._transition(velocity, x_t, sigma, sigma_next)
            mean_ode = ode(x_t, v, sigma, sigma_next)[0]
            x_0_hat = ode(x_t, v, sigma, 0.0)[0]
            if not any(noisy_steps):
                no_logp = jnp.zeros(x_t.shape[0], jnp.float32)
                return mean_ode.astype(self.storage_dtype), no_logp, x_0_hat
            noise = _step_noise(key, step, x_t.shape)
            x_next = jnp.where(noisy, mean + std * noise, mean_ode).astype(self.storage_dtype)
            return x_next, jnp.where(noisy, self._score(x_next, mean, std), 0.0), x_0_hat

        return advance, xs

    def _transition(self, velocity, x_t, sigma, sigma_next):
        """Mean and std of the kernel, and the velocity, at one state."""
        v = velocity(x_t, sigma)
        mean, std = get_kernel(self.kernel)(
            x_t,
            v,
            _per_image(sigma, x_t),
            _per_image(sigma_next, x_t),
            noise_level=self.noise_level,
            sigma_max=jnp.asarray(self.sigmas, jnp.float32)[1],
        )
        return mean, std, v

    def _score(self, x_next: Array, mean: Array, std: Array) -> Array:
        """The log-density [N], and 0 where the step had no noise and hence none."""
        has_noise = std > 0
        if self.log_density == SQUARED_ERROR:
            logp = squared_error(x_next, mean)
        else:
            logp = log_prob(x_next, mean, jnp.where(has_noise, std, 1.0))
        return jnp.where(has_noise.reshape(-1), logp, 0.0)


def image_keys(key: Key[Array, ""], num_images: int) -> Key[Array, " n"]:
    """One key per image, so that its noise does not depend on what is drawn beside it.

    Args:
        key: of all.
        num_images: N.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_images))


def swap_images_and_steps(trajectory: Trajectory) -> Trajectory:
    """[T, N, ...] <-> [N, T, ...] of all but x_0, so that batches of images can be joined."""
    swapped = jax.tree.map(lambda a: a.swapaxes(0, 1), trajectory)
    return dataclasses.replace(swapped, x_0=trajectory.x_0)


def _step_noise(key: Array, step: Array, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian noise [N, ...] of one step; one key, or [N]."""
    keys = key if key.ndim else image_keys(key, shape[0])
    draw = lambda k: jax.random.normal(jax.random.fold_in(k, step), shape[1:], jnp.float32)  # noqa: E731
    return jax.vmap(draw)(keys)


def _per_image(sigma: ArrayLike, x: Array) -> Array:
    """A scalar as it is; [N] as [N, 1, ...], so that it broadcasts with x."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) if sigma.ndim else sigma
