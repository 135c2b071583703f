"""Transition kernels: the Gaussian policy p(x_next | x_t) of one sampler step.

Notation: x_t = (1 - sigma) x_0 + sigma eps, velocity v = eps - x_0, dt = sigma_next - sigma < 0.
All kernels have one signature and give a mean, which the velocity decides, and a std, which the
schedule alone decides; hence the policy's entropy does not depend on what is learned.
Everything is computed in float32 whatever the model's precision: the clip range of the policy
loss (1e-4 and below) is finer than bfloat16.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pec_jax.types import Scalar

_LOG_2PI = math.log(2.0 * math.pi)


@runtime_checkable
class Kernel(Protocol):
    """The signature of every transition kernel."""

    def __call__(
        self,
        x_t: Float[ArrayLike, "n ..."],
        velocity: Float[ArrayLike, "n ..."],
        sigma: Float[ArrayLike, "..."],
        sigma_next: Float[ArrayLike, "..."],
        *,
        noise_level: Scalar,
        sigma_max: Scalar,
    ) -> tuple[Float[Array, "n ..."], Float[Array, "..."]]: ...


def flow_sde(
    x_t: Float[ArrayLike, "n ..."],
    velocity: Float[ArrayLike, "n ..."],
    sigma: Float[ArrayLike, "..."],
    sigma_next: Float[ArrayLike, "..."],
    *,
    noise_level: Scalar,
    sigma_max: Scalar,
) -> tuple[Float[Array, "n ..."], Float[Array, "..."]]:
    """Flow-GRPO's reverse SDE, whose noise grows towards sigma = 1.

    s = a sqrt(sigma / (1 - sigma)), with sigma_max for the sigma below the line where sigma = 1;
    mean = x_t (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt;
    std = s sqrt(-dt).

    Args:
        x_t: [N, ...] the state the step starts from.
        velocity: [N, ...] the model's velocity there.
        sigma: noise level of x_t in (0, 1]; a scalar, or an array that broadcasts with x_t.
        sigma_next: noise level after the step, below sigma.
        noise_level: a >= 0; Flow-GRPO uses 0.7 (SD3) and 0.9 (FLUX). 0 gives the ODE step.
        sigma_max: the schedule's second sigma, which stands in where sigma = 1.

    Returns:
        mean [N, ...] and std (of sigma's shape), float32.

    Source: Liu et al. 2025, Flow-GRPO (arXiv 2505.05470), eq. 9.
    """
    sigma, sigma_next = _as_float32(sigma, sigma_next)
    below_one = jnp.where(sigma >= 1.0, jnp.float32(sigma_max), sigma)
    scale = noise_level * jnp.sqrt(sigma / (1.0 - below_one))
    return _reverse_sde(x_t, velocity, sigma, sigma_next, scale)


def dance_sde(
    x_t: Float[ArrayLike, "n ..."],
    velocity: Float[ArrayLike, "n ..."],
    sigma: Float[ArrayLike, "..."],
    sigma_next: Float[ArrayLike, "..."],
    *,
    noise_level: Scalar,
    sigma_max: Scalar,
) -> tuple[Float[Array, "n ..."], Float[Array, "..."]]:
    """DanceGRPO's reverse SDE: the form of `flow_sde` with the constant scale s = eta.

    Args:
        x_t: [N, ...] the state the step starts from.
        velocity: [N, ...] the model's velocity there.
        sigma: noise level of x_t in (0, 1].
        sigma_next: noise level after the step, below sigma.
        noise_level: eta >= 0; DanceGRPO uses 0.3. 0 gives the ODE step.
        sigma_max: not used; all kernels share one signature.

    Returns:
        mean [N, ...] and std (of sigma's shape), float32.

    Source: Xue et al. 2025, DanceGRPO (arXiv 2505.07818), eq. 8.
    """
    del sigma_max
    sigma, sigma_next = _as_float32(sigma, sigma_next)
    scale = jnp.broadcast_to(jnp.float32(noise_level), sigma.shape)
    return _reverse_sde(x_t, velocity, sigma, sigma_next, scale)


def cps(
    x_t: Float[ArrayLike, "n ..."],
    velocity: Float[ArrayLike, "n ..."],
    sigma: Float[ArrayLike, "..."],
    sigma_next: Float[ArrayLike, "..."],
    *,
    noise_level: Scalar,
    sigma_max: Scalar,
) -> tuple[Float[Array, "n ..."], Float[Array, "..."]]:
    """Coefficients-preserving sampling: fresh noise replaces old, the total stays sigma_next.

    std = sigma_next sin(a pi / 2); x_0^ = x_t - sigma v; x_1^ = x_t + (1 - sigma) v;
    mean = (1 - sigma_next) x_0^ + sqrt(sigma_next^2 - std^2) x_1^.

    Args:
        x_t: [N, ...] the state the step starts from.
        velocity: [N, ...] the model's velocity there.
        sigma: noise level of x_t in (0, 1].
        sigma_next: noise level after the step, below sigma.
        noise_level: a in [0, 1], the share of the noise that is fresh. 0 gives the ODE step.
        sigma_max: not used; all kernels share one signature.

    Returns:
        mean [N, ...] and std (of sigma's shape), float32. The std of the last step is 0.

    Source: Wang and Yu 2025, Coefficients-Preserving Sampling (arXiv 2509.05952).
    """
    del sigma_max
    x_t, velocity, sigma, sigma_next = _as_float32(x_t, velocity, sigma, sigma_next)
    angle = jnp.float32(noise_level) * (math.pi / 2.0)
    x_0_hat = x_t - sigma * velocity
    x_1_hat = x_t + (1.0 - sigma) * velocity
    # sqrt(sigma_next^2 - std^2) = sigma_next cos(angle), without the cancellation.
    mean = (1.0 - sigma_next) * x_0_hat + sigma_next * jnp.cos(angle) * x_1_hat
    return mean, sigma_next * jnp.sin(angle)


def ode(
    x_t: Float[ArrayLike, "n ..."],
    velocity: Float[ArrayLike, "n ..."],
    sigma: Float[ArrayLike, "..."],
    sigma_next: Float[ArrayLike, "..."],
    *,
    noise_level: Scalar = 0.0,
    sigma_max: Scalar = 1.0,
) -> tuple[Float[Array, "n ..."], Float[Array, "..."]]:
    """The Euler step of the probability-flow ODE: mean = x_t + v dt, std = 0.

    Args:
        x_t: [N, ...] the state the step starts from.
        velocity: [N, ...] the model's velocity there.
        sigma: noise level of x_t in (0, 1].
        sigma_next: noise level after the step, below sigma.
        noise_level: not used; all kernels share one signature.
        sigma_max: not used.

    Returns:
        mean [N, ...] and std = 0 (of sigma's shape), float32.
    """
    del noise_level, sigma_max
    x_t, velocity, sigma, sigma_next = _as_float32(x_t, velocity, sigma, sigma_next)
    return x_t + velocity * (sigma_next - sigma), jnp.zeros_like(sigma)


KERNELS: dict[str, Kernel] = {
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
    "ode": ode,
}


def get_kernel(name: str | Kernel) -> Kernel:
    """The kernel of that name; a kernel is returned as it is.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if callable(name):
        return name
    if name not in KERNELS:
        raise ValueError(f"Unknown sampler {name!r}; choose one of {', '.join(KERNELS)}.")
    return KERNELS[name]


def log_prob(
    x_next: Float[ArrayLike, "n ..."], mean: Float[ArrayLike, "n ..."], std: Float[ArrayLike, "..."]
) -> Float[Array, " n"]:
    """Gaussian log-density, its mean over the non-batch dimensions.

    mean_i [-(x_i - mu_i)^2 / (2 std^2) - log std - 1/2 log(2 pi)]

    Args:
        x_next: [N, ...] where the step went.
        mean: [N, ...] the kernel's mean.
        std: the kernel's std > 0; a scalar, or an array that broadcasts with x_next.

    Returns:
        [N] float32, nats per dimension.

    Source: Flow-GRPO's code, which takes the mean where the density would be the sum.
    """
    x_next, mean, std = _as_float32(x_next, mean, std)
    return _mean_over_dimensions(-0.5 * jnp.square((x_next - mean) / std) - jnp.log(std)) - (
        0.5 * _LOG_2PI
    )


def squared_error(
    x_next: Float[ArrayLike, "n ..."], mean: Float[ArrayLike, "n ..."]
) -> Float[Array, " n"]:
    """What Flow-GRPO's code takes for the log-density of `cps`: -mean_i (x_i - mu_i)^2.

    The Gaussian's without its constant, times 2 std^2: steps of little noise then count as little
    as they move the image, where the density would give them most of the gradient.

    Args:
        x_next: [N, ...] where the step went.
        mean: [N, ...] the kernel's mean.

    Returns:
        [N] float32.

    Source: yifan123/flow_grpo@54809b5: flow_grpo/diffusers_patch/sd3_sde_with_logprob.py.
    """
    x_next, mean = _as_float32(x_next, mean)
    return -_mean_over_dimensions(jnp.square(x_next - mean))


def gaussian_kl(
    mean: Float[ArrayLike, "n ..."],
    mean_ref: Float[ArrayLike, "n ..."],
    std: Float[ArrayLike, "..."],
    dt: Float[ArrayLike, "..."] | None = None,
) -> Float[Array, " n"]:
    """KL divergence of two Gaussians of equal std, its mean over the non-batch dimensions.

    mean_i (mu_i - mu_ref_i)^2 / (2 std^2)

    Args:
        mean: [N, ...] of the policy.
        mean_ref: [N, ...] of the reference policy at the same state.
        std: their common std > 0; a scalar, or an array that broadcasts with mean.
        dt: None for the exact divergence. Given the step's sigma_next - sigma, the std's factor
            sqrt(-dt) is left out of it, which divides by 2 s^2 as Flow-GRPO's code does.

    Returns:
        [N] float32, nats per dimension.
    """
    mean, mean_ref, std = _as_float32(mean, mean_ref, std)
    variance = jnp.square(std)
    if dt is not None:
        variance = variance / jnp.abs(jnp.asarray(dt, jnp.float32))
    return _mean_over_dimensions(jnp.square(mean - mean_ref) / (2.0 * variance))


def policy_entropy(std: Float[ArrayLike, "*s"]) -> Float[Array, "*s"]:
    """Entropy of the Gaussian policy: 1/2 log(2 pi e std^2).

    Args:
        std: > 0, of any shape.

    Returns:
        float32 of std's shape, nats per dimension. The velocity does not enter, so its
        gradient with respect to anything learned is exactly zero.
    """
    std = jnp.asarray(std, jnp.float32)
    return 0.5 * (1.0 + _LOG_2PI) + jnp.log(std)


def schedule_stds(
    sigmas: Float[ArrayLike, " t_plus_1"], kernel: str | Kernel, noise_level: Scalar
) -> Float[Array, " t"]:
    """The std of every step of a schedule, e.g. s_t sqrt(-dt) for `flow_sde`.

    Args:
        sigmas: [T + 1] decreasing from 1 to 0.
        kernel: a kernel or its name.
        noise_level: as the kernel takes it.

    Returns:
        [T] float32.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    nothing = jnp.zeros(sigmas.shape[0] - 1, jnp.float32)
    _, std = get_kernel(kernel)(
        nothing, nothing, sigmas[:-1], sigmas[1:], noise_level=noise_level, sigma_max=sigmas[1]
    )
    return std


def velocity_gains(
    sigmas: Float[ArrayLike, " t_plus_1"], kernel: str | Kernel, noise_level: Scalar
) -> Float[Array, " t"]:
    """How much each step's log-density answers to the velocity: |d mean / d v| / std.

    The step's share of the policy gradient grows with it. At the start of a path the velocity
    hardly moves the mean beside the noise; towards its end, where noise is little, it moves it a
    lot. With `cps` on Stable Diffusion 3's schedule, whose last but one sigma is near 0, the step
    to it has 130 times the gain of the median one, and with `flow_sde` 6 times.

    Args:
        sigmas: [T + 1] decreasing from 1 to 0.
        kernel: a kernel or its name.
        noise_level: as the kernel takes it.

    Returns:
        [T] float32; inf where a step has no noise.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    nothing = jnp.zeros(sigmas.shape[0] - 1, jnp.float32)
    # Every kernel's mean is linear in the velocity.
    slope, std = get_kernel(kernel)(
        nothing, nothing + 1, sigmas[:-1], sigmas[1:], noise_level=noise_level, sigma_max=sigmas[1]
    )
    return jnp.abs(slope) / std


def _reverse_sde(x_t, velocity, sigma, sigma_next, scale):
    """One Euler-Maruyama step of the reverse SDE with diffusion coefficient `scale`."""
    x_t, velocity = _as_float32(x_t, velocity)
    dt = sigma_next - sigma
    correction = jnp.square(scale) / (2.0 * sigma)
    mean = x_t * (1.0 + correction * dt) + velocity * (1.0 + correction * (1.0 - sigma)) * dt
    return mean, scale * jnp.sqrt(-dt)


def _as_float32(*arrays: ArrayLike) -> tuple[Array, ...]:
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def _mean_over_dimensions(x: Array) -> Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
