"""DiffusionNFT: reinforcement as a contrast of two regressions on noised samples.

The images are drawn by an old policy with any sampler. Each is noised again by the forward
process, and the model regresses on it twice: with a velocity that lies beta of the way from the
old policy to the model, weighted by how good the image is, and with that velocity's mirror image in
the old policy, weighted by how bad it is. No log-probabilities and no trajectory are needed.

Notation: x_t = (1 - sigma) x_0 + sigma eps, target velocity eps - x_0. All arrays are flat batches
[N, ...] of any latent rank; sigma is a scalar or [N]. Everything is float32.

Source: Zheng et al. 2025, DiffusionNFT (arXiv 2509.16117); docs/objectives.md says where the
authors' code differs from it, and this follows the code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from pec_jax.types import PyTree, Scalar

# Lower bound of the mean |x_0 error| that a regression loss is divided by; in units of latents.
ERROR_FLOOR = 1e-5


class Noised(NamedTuple):
    """What the model is given and what it regresses on."""

    x_t: Float[Array, "n ..."]
    target: Float[Array, "n ..."]  # the velocity eps - x_0


class Decay(NamedTuple):
    """Schedule of the old policy's decay: 0 for `flat` updates, then a ramp up to `maximum`."""

    flat: int  # optimizer updates
    rate: float  # per update
    maximum: float  # in [0, 1)


# The authors' decay types 0, 1 and 2.
DECAYS: dict[str, Decay] = {
    "on_policy": Decay(flat=0, rate=0.0, maximum=0.0),
    "ramp": Decay(flat=0, rate=0.001, maximum=0.5),
    "delayed_ramp": Decay(flat=75, rate=0.0075, maximum=0.999),
}


def optimality(advantages: Float[ArrayLike, "*n"], clip: Scalar) -> Float[Array, "*n"]:
    """How probable it is that an image is a good one: r = 1/2 + clip(A, -c, c) / (2 c).

    Args:
        advantages: [...], rewards centred and scaled within their groups.
        clip: c > 0. The authors take 5 with advantages in stds, so that r stays near 1/2 and
            `losses`, which multiplies by c, sees (2 r - 1) c = A.

    Returns:
        [...] float32 in [0, 1], without gradient.
    """
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
    return 0.5 + jnp.clip(advantages, -clip, clip) / (2.0 * clip)


def forward_process(
    x_0: Float[ArrayLike, "n ..."], noise: Float[ArrayLike, "n ..."], sigma: Float[ArrayLike, "..."]
) -> Noised:
    """Noises clean latents: x_t = (1 - sigma) x_0 + sigma eps.

    Args:
        x_0: [N, ...] final latents of the rollout.
        noise: [N, ...] unit Gaussian, drawn anew for every (image, sigma).
        sigma: [] or [N] in (0, 1].

    Returns:
        x_t and the target velocity eps - x_0, float32.
    """
    x_0, noise = jnp.asarray(x_0, jnp.float32), jnp.asarray(noise, jnp.float32)
    sigma = _per_sample(sigma, x_0)
    return Noised(x_t=(1.0 - sigma) * x_0 + sigma * noise, target=noise - x_0)


def implicit_velocities(
    velocity: Float[ArrayLike, "n ..."],
    velocity_old: Float[ArrayLike, "n ..."],
    beta: Scalar,
) -> tuple[Float[Array, "n ..."], Float[Array, "n ..."]]:
    """The positive and the negative policy: v_old + beta (v - v_old), v_old - beta (v - v_old).

    Args:
        velocity: [N, ...] of the model; carries the gradient.
        velocity_old: [N, ...] of the policy that drew the images, at the same x_t and sigma.
        beta: > 0; the smaller, the further the model moves for the same reward.

    Returns:
        Both [N, ...] float32; they are equal where velocity = velocity_old.
    """
    velocity_old = jax.lax.stop_gradient(jnp.asarray(velocity_old, jnp.float32))
    step = beta * (jnp.asarray(velocity, jnp.float32) - velocity_old)
    return velocity_old + step, velocity_old - step


def x_0_loss(
    velocity: Float[Array, "n ..."], target: Float[Array, "n ..."], sigma: Float[ArrayLike, "..."]
) -> Float[Array, " n"]:
    """The squared error of the predicted x_0 over its own mean size.

    mean_i e_i^2 / max(mean_i |e_i|, floor), the denominator without gradient, where
    e = (x_t - sigma v) - x_0 = -sigma (v - target).

    Args:
        velocity: [N, ...].
        target: [N, ...] of `forward_process`.
        sigma: [] or [N] in (0, 1].

    Returns:
        [N] float32, in units of latents.
    """
    # From the velocities and not from x_t - sigma v - x_0, which cancels at small sigma.
    error = _per_sample(sigma, target) * (velocity - target)
    size = jnp.maximum(_mean_over_dimensions(jnp.abs(error)), ERROR_FLOOR)
    return _mean_over_dimensions(jnp.square(error)) / jax.lax.stop_gradient(size)


def losses(
    velocity: Float[Array, "n ..."],
    velocity_old: Float[Array, "n ..."],
    target: Float[Array, "n ..."],
    sigma: Float[ArrayLike, "..."],
    r: Float[ArrayLike, " n"],
    *,
    beta: Scalar,
    clip: Scalar,
) -> Float[Array, " n"]:
    """DiffusionNFT's loss of each sample: (c / beta) (r L_plus + (1 - r) L_minus).

    L_plus and L_minus are the `x_0_loss` of the two `implicit_velocities`.

    Args:
        velocity: [N, ...] of the model at x_t; carries the gradient.
        velocity_old: [N, ...] of the old policy at x_t.
        target: [N, ...] of `forward_process`.
        sigma: [] or [N] in (0, 1].
        r: [N] in [0, 1], of `optimality`.
        beta: > 0, as for `implicit_velocities`.
        clip: c, the one `optimality` was given.

    Returns:
        [N] float32. Where velocity = velocity_old the loss does not depend on r, and its gradient
        is (2 r - 1) c = A times that of the plain regression `x_0_loss`, whatever beta.
    """
    positive, negative = implicit_velocities(velocity, velocity_old, beta)
    r = jax.lax.stop_gradient(jnp.asarray(r, jnp.float32))
    return (clip / beta) * (
        r * x_0_loss(positive, target, sigma) + (1.0 - r) * x_0_loss(negative, target, sigma)
    )


def velocity_kl(
    velocity: Float[ArrayLike, "n ..."], velocity_ref: Float[ArrayLike, "n ..."]
) -> Float[Array, " n"]:
    """Distance to the base model: the squared difference of velocities, mean over dimensions.

    Args:
        velocity: [N, ...]; carries the gradient.
        velocity_ref: [N, ...] of the base model at the same x_t and sigma.

    Returns:
        [N] float32. Not divided by any variance: it is called a KL by custom.
    """
    difference = jnp.asarray(velocity, jnp.float32) - jax.lax.stop_gradient(
        jnp.asarray(velocity_ref, jnp.float32)
    )
    return _mean_over_dimensions(jnp.square(difference))


def draw_sigmas(
    keys: Key[Array, " n"], sigmas: Float[ArrayLike, " t_plus_1"], num_steps: int
) -> Float[Array, "s n"]:
    """Which noise levels each image is trained at: distinct ones of the sampler, in random order.

    Args:
        keys: [N], one key per image, so that an image's draw does not depend on its batch.
        sigmas: [T + 1] the sampler's schedule from 1 to 0; the last, 0, is never drawn.
        num_steps: S in 1..T. The authors take int(0.99 T) = T - 1.

    Returns:
        [S, N] float32; the forward passes of row s share one micro-batch.

    Raises:
        ValueError: for a `num_steps` outside 1..T.
    """
    levels = jnp.asarray(sigmas, jnp.float32)[:-1]
    if not 1 <= num_steps <= len(levels):
        raise ValueError(
            f"{num_steps} noise levels per image were asked for, of {len(levels)} sampler steps; "
            f"choose 1 to {len(levels)}."
        )
    orders = jax.vmap(lambda key: jax.random.permutation(key, levels))(keys)
    return orders[:, :num_steps].T


def old_policy_decay(schedule: str, updates: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """How much of the old policy stays when it next follows the model.

    min(rate (updates - flat), maximum), and 0 before `flat`; see `DECAYS`.

    Args:
        schedule: a name in `DECAYS`.
        updates: optimizer updates made so far in the whole run, not iterations.

    Returns:
        [] float32 in [0, 1).

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if schedule not in DECAYS:
        raise ValueError(
            f"Unknown decay of the old policy {schedule!r}; choose one of {', '.join(DECAYS)}."
        )
    flat, rate, maximum = DECAYS[schedule]
    return jnp.clip((jnp.asarray(updates, jnp.float32) - flat) * rate, 0.0, maximum)


def follow(old: PyTree, params: PyTree, decay: Scalar) -> PyTree:
    """The old policy after an iteration: decay old + (1 - decay) params.

    Args:
        old: trainable parameters of the policy that drew the images.
        params: of the model, after the iteration's updates.
        decay: of `old_policy_decay`; 0 copies the parameters exactly.

    Returns:
        The next old policy, in the dtypes of `old`.
    """
    return jax.tree.map(lambda o, p: (decay * o + (1.0 - decay) * p).astype(o.dtype), old, params)


def _per_sample(sigma: ArrayLike, like: Array) -> Array:
    """sigma [] or [N], shaped to broadcast with [N, ...]."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - 1)) if sigma.ndim else sigma


def _mean_over_dimensions(x: Array) -> Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
