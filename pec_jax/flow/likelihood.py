"""The entropy of what the model draws, by change of variables along the probability-flow ODE.

The policy's entropy is fixed by the noise schedule; the entropy of the finished latents is not:
it depends on the learned field through its divergence. Evaluated, never trained.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from pec_jax.flow.sampler import Velocity


def output_log_prob(
    velocity: Velocity,
    x_1: Float[Array, "n ..."],
    *,
    sigmas: Float[ArrayLike, " t_plus_1"],
    key: Key[Array, ""],
    num_probes: int = 1,
) -> tuple[Float[Array, " n"], Float[Array, "n ..."]]:
    """Log-density of the latents that the ODE makes of noise.

    log p(x_0 | c) = log p(x_1) + integral_0^1 div v dsigma along dx/dsigma = v, by the midpoint
    rule: half a step by Euler, then velocity and divergence there. Its error is of the second
    order in the step. Measured at 40 evaluations of v on a linear schedule, for Gaussians of std
    0.3 to 2: it is 0.001 nats at most, Euler's 0.025; Heun's is twice the midpoint's and asks for
    v at sigma = 0. On the embedded model, 32 evaluations come within 0.05 nats of the limit, and
    Euler's stay 0.3 above it. The entropy is that of the ODE, the limit of fine steps, and not of
    a sampler that takes few.
    div v = E e^T J e over Rademacher probes e (Hutchinson), exact where J is diagonal.

    Args:
        velocity: the model, guided or not, with its weights and prompts in place.
        x_1: [N, ...] unit Gaussian noise.
        sigmas: [T + 1] from 1 to 0.
        key: of the probes; step t draws from fold_in(key, t).
        num_probes: a step, >= 1; each costs a Jacobian-vector product, one after another. A step
            costs one evaluation of v besides.

    Returns:
        log p(x_0 | c) [N] float32, nats per dimension, and x_0 [N, ...].

    Raises:
        ValueError: for fewer than one probe.

    Source: Chen et al. 2018, Neural ODE (arXiv 1806.07366), eq. 8; Grathwohl et al. 2019, FFJORD
    (arXiv 1810.01367), eq. 7.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}: the divergence needs at least one probe.")
    sigmas = jnp.asarray(sigmas, jnp.float32)
    x_1 = x_1.astype(jnp.float32)
    axes = tuple(range(1, x_1.ndim))

    def step(carry, inputs):
        x, log_prob = carry
        index, sigma, sigma_next = inputs

        dt = sigma_next - sigma

        def field(x, sigma):
            return velocity(x, sigma).astype(jnp.float32)

        middle = sigma + 0.5 * dt
        x_middle = x + field(x, sigma) * (0.5 * dt)

        def probe(key):
            direction = jax.random.rademacher(key, x.shape, jnp.float32)
            v, along = jax.jvp(lambda x: field(x, middle), (x_middle,), (direction,))
            return v, jnp.mean(direction * along, axis=axes)

        v, divergence = jax.lax.map(
            probe, jax.random.split(jax.random.fold_in(key, index), num_probes)
        )
        return (x + v[0] * dt, log_prob - jnp.mean(divergence, axis=0) * dt), None

    start = -0.5 * jnp.mean(jnp.square(x_1), axis=axes) - 0.5 * jnp.log(2.0 * jnp.pi)
    steps = jnp.arange(len(sigmas) - 1), sigmas[:-1], sigmas[1:]
    (x_0, log_prob), _ = jax.lax.scan(step, (x_1, start), steps)
    return log_prob, x_0


def mean_and_error(
    log_prob: Float[Array, "..."],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The entropy -E log p(x_0 | c) and its standard error.

    Args:
        log_prob: [N] of samples that are independent of one another, or [P, K] of K images of each
            of P prompts. Images of one prompt share its conditional entropy, so that the error is
            taken over the P prompts' means. Either way the probes' noise is in it.

    Returns:
        Two scalars, nats per dimension. The error of a single sample or prompt is nan.
    """
    entropies = -log_prob if log_prob.ndim == 1 else -jnp.mean(log_prob, axis=-1)
    return jnp.mean(entropies), jnp.std(entropies, ddof=1) / jnp.sqrt(entropies.size)
