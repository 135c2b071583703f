"""The sampler: noise to image in one lax.scan, and the log-prob of a step it has taken.

Rollout and update share `_transition` and `_score`: a step is scored by the same code that took
it. x_next is rounded to the storage type before its log-prob is taken, since the rounded value
is the one the update will read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.flow.transition import Kernel, get_kernel, log_prob, ode
from pec_jax.types import Conditioning, PyTree, Trajectory

Array = jax.Array

# velocity_fn(params, x_t [N, ...], sigma (scalar or [N]), conditioning [N, ...]) -> [N, ...]
VelocityFn = Callable[[PyTree, Array, Array, Conditioning], Array]


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

    def velocity(params, x_t, sigma, conditioning):
        def both(positive, other):  # [N, ...] twice -> [2 N, ...]
            # Interleaved and not end to end: of a batch sharded over devices, the two halves
            # of an image stay on one device and nothing moves.
            pair = jnp.stack([jnp.broadcast_to(other, positive.shape), positive], axis=1)
            return pair.reshape(-1, *positive.shape[1:])

        sigma = jnp.asarray(sigma)
        doubled = velocity_fn(
            params,
            both(x_t, x_t),
            both(sigma, sigma) if sigma.ndim else sigma,
            jax.tree.map(both, conditioning, negative),
        )
        doubled = doubled.astype(jnp.float32).reshape(-1, 2, *doubled.shape[1:])
        v_neg, v_pos = doubled[:, 0], doubled[:, 1]
        return v_neg + scale * (v_pos - v_neg)

    return velocity


def sample(
    velocity_fn: VelocityFn,
    params: PyTree,
    x_1: Array,
    conditioning: Conditioning,
    *,
    sigmas: Array | np.ndarray,
    kernel: str | Kernel,
    noise_level: float | Array,
    stochastic: Sequence[bool],
    key: Array,
    storage_dtype: Any = jnp.float32,
    keep_predictions: bool = False,
) -> Trajectory:
    """Samples paths from noise to image, with the log-prob of every stochastic step.

    Args:
        velocity_fn: the model, guided or not.
        params: what it takes first.
        x_1: [N, h, w, C] unit Gaussian noise.
        conditioning: [N, ...].
        sigmas: [T + 1] from 1 to 0.
        kernel: of the stochastic steps, or its name.
        noise_level: as the kernel takes it.
        stochastic: T booleans (static); the other steps follow the ODE.
        key: the only source of noise; one, or [N], one an image (see `image_keys`).
        storage_dtype: of the states. Each is rounded to it before anything else reads it.
        keep_predictions: fill x_0_hat = x_t - sigma v, float32, of every step.

    Returns:
        The trajectory: states in storage_dtype, logp float32 (0 at ODE steps), x_0 float32.

    Raises:
        ValueError: where `stochastic` and `sigmas` disagree about T, or for an unknown kernel.
    """
    advance, xs = _prepare(
        velocity_fn, params, conditioning, sigmas, kernel, noise_level, stochastic, key
    )

    def step(x_t, x):
        x_next, logp, x_0_hat = advance(x_t, x, storage_dtype)
        return x_next, (x_next, logp, x_0_hat if keep_predictions else None)

    x_1 = x_1.astype(storage_dtype)
    x_0, (x_next, logp, x_0_hat) = jax.lax.scan(step, x_1, xs)
    x_t = jnp.concatenate([x_1[None], x_next[:-1]])
    return Trajectory(
        x_t=x_t, x_next=x_next, logp=logp, x_0=x_0.astype(jnp.float32), x_0_hat=x_0_hat
    )


def sample_final(
    velocity_fn: VelocityFn,
    params: PyTree,
    x_1: Array,
    conditioning: Conditioning,
    *,
    sigmas: Array | np.ndarray,
    kernel: str | Kernel,
    noise_level: float | Array,
    stochastic: Sequence[bool],
    key: Array,
) -> Array:
    """The final latents of `sample`'s float32 paths, without keeping the paths.

    Args and Raises: as for `sample`.

    Returns:
        x_0 [N, h, w, C] float32.
    """
    advance, xs = _prepare(
        velocity_fn, params, conditioning, sigmas, kernel, noise_level, stochastic, key
    )

    def step(x_t, x):
        return advance(x_t, x, jnp.float32)[0], None

    return jax.lax.scan(step, x_1.astype(jnp.float32), xs)[0]


def sample_ode(
    velocity_fn: VelocityFn,
    params: PyTree,
    x_1: Array,
    conditioning: Conditioning,
    *,
    sigmas: Array | np.ndarray,
) -> Array:
    """The final latents of the probability-flow ODE; diffusers' Euler sampler.

    Args:
        velocity_fn: the model, guided or not.
        params: what it takes first.
        x_1: [N, h, w, C] unit Gaussian noise.
        conditioning: [N, ...].
        sigmas: [T + 1] from 1 to 0.

    Returns:
        x_0 [N, h, w, C] float32.
    """
    return sample_final(
        velocity_fn,
        params,
        x_1,
        conditioning,
        sigmas=sigmas,
        kernel=ode,
        noise_level=0.0,
        stochastic=(False,) * (len(sigmas) - 1),
        key=jax.random.key(0),  # never drawn from
    )


def image_keys(key: Array, num_images: int) -> Array:
    """One key an image, so that its noise does not depend on what is drawn beside it.

    Args:
        key: of all.
        num_images: N.

    Returns:
        [N] keys.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_images))


def swap_images_and_steps(trajectory: Trajectory) -> Trajectory:
    """[T, N, ...] <-> [N, T, ...] of all but x_0, so that batches of images can be joined."""
    swapped = jax.tree.map(lambda a: a.swapaxes(0, 1), trajectory)
    return dataclasses.replace(swapped, x_0=trajectory.x_0)


def step_log_prob(
    velocity_fn: VelocityFn,
    params: PyTree,
    x_t: Array,
    x_next: Array,
    sigma: Array,
    sigma_next: Array,
    conditioning: Conditioning,
    *,
    kernel: str | Kernel,
    noise_level: float | Array,
    sigma_max: float | Array,
) -> tuple[Array, Array, Array]:
    """The log-prob that the policy of `params` gives to a step already taken.

    Args:
        velocity_fn: the model, guided as it was in the rollout.
        params: what to differentiate with respect to.
        x_t: [N, h, w, C] as stored.
        x_next: [N, h, w, C] as stored.
        sigma: scalar or [N].
        sigma_next: scalar or [N].
        conditioning: [N, ...].
        kernel: of the rollout, or its name.
        noise_level: of the rollout.
        sigma_max: sigmas[1] of the rollout's schedule.

    Returns:
        logp [N], mean [N, h, w, C], std (broadcasts with mean), float32.
    """
    mean, std, _ = _transition(
        velocity_fn,
        params,
        x_t,
        sigma,
        sigma_next,
        conditioning,
        kernel=get_kernel(kernel),
        noise_level=noise_level,
        sigma_max=sigma_max,
    )
    return _score(x_next, mean, std), mean, std


def _prepare(velocity_fn, params, conditioning, sigmas, kernel, noise_level, stochastic, key):
    """One step as a function of its state and of the scan's inputs, and those inputs."""
    num_steps = len(sigmas) - 1
    if len(stochastic) != num_steps:
        raise ValueError(
            f"stochastic names {len(stochastic)} steps, but {len(sigmas)} sigmas make {num_steps}."
        )
    kernel = get_kernel(kernel)
    sigmas = jnp.asarray(sigmas, jnp.float32)
    xs = (jnp.arange(num_steps), sigmas[:-1], sigmas[1:], jnp.asarray(stochastic))

    def advance(x_t, x, storage_dtype):
        step, sigma, sigma_next, noisy = x
        mean, std, velocity = _transition(
            velocity_fn,
            params,
            x_t,
            sigma,
            sigma_next,
            conditioning,
            kernel=kernel,
            noise_level=noise_level,
            sigma_max=sigmas[1],
        )
        mean_ode = ode(x_t, velocity, sigma, sigma_next)[0]
        x_0_hat = ode(x_t, velocity, sigma, 0.0)[0]
        if not any(stochastic):
            return mean_ode.astype(storage_dtype), jnp.zeros(x_t.shape[0], jnp.float32), x_0_hat
        noise = _step_noise(key, step, x_t.shape)
        x_next = jnp.where(noisy, mean + std * noise, mean_ode).astype(storage_dtype)
        return x_next, jnp.where(noisy, _score(x_next, mean, std), 0.0), x_0_hat

    return advance, xs


def _step_noise(key: Array, step: Array, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian noise [N, ...] of one step; one key, or [N]."""
    keys = key if key.ndim else image_keys(key, shape[0])
    draw = lambda k: jax.random.normal(jax.random.fold_in(k, step), shape[1:], jnp.float32)  # noqa: E731
    return jax.vmap(draw)(keys)


def _transition(
    velocity_fn, params, x_t, sigma, sigma_next, conditioning, *, kernel, noise_level, sigma_max
):
    """Mean and std of the kernel, and the velocity, at one state."""
    velocity = velocity_fn(params, x_t, sigma, conditioning)
    sigma, sigma_next = _per_image(sigma, x_t), _per_image(sigma_next, x_t)
    mean, std = kernel(
        x_t, velocity, sigma, sigma_next, noise_level=noise_level, sigma_max=sigma_max
    )
    return mean, std, velocity


def _score(x_next: Array, mean: Array, std: Array) -> Array:
    """log_prob [N], and 0 where the step had no noise and hence no density."""
    has_noise = std > 0
    logp = log_prob(x_next, mean, jnp.where(has_noise, std, 1.0))
    return jnp.where(has_noise.reshape(-1), logp, 0.0)


def _per_image(sigma: Array, x: Array) -> Array:
    """A scalar as it is; [N] as [N, 1, ...], so that it broadcasts with x."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) if sigma.ndim else sigma
