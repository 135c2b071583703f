"""GRPO-Guard: an importance ratio that is centred at 1 at every sampler step.

Plain GRPO clips r = exp(logp - logp_old). Under the policy that took the step, log r of a Gaussian
has the mean -|mean - mean_old|^2 / (2 std^2) and a spread proportional to 1 / std. It is thus
biased to the left, most at the low-noise steps, and good samples rarely reach the upper clip. Guard
removes the mean and multiplies by std; a weight then equalises the steps' gradients.

The ratio composes with `pec_jax.rl.losses`: `clipped_surrogate(log_ratio, 0.0, ...)` and
`ratio_metrics(log_ratio, 0.0, ...)`.

Source: Wang et al. 2025, GRPO-Guard (arXiv 2510.22319); docs/objectives.md says where the authors'
code differs from it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pec_jax.rl.losses import clipped_surrogate
from pec_jax.types import Scalar


def normalised_log_ratio(
    x_next: Float[ArrayLike, "n ..."],
    mean: Float[ArrayLike, "n ..."],
    mean_old: Float[ArrayLike, "n ..."],
    std: Float[ArrayLike, "..."],
) -> Float[Array, " n"]:
    """The log of Guard's ratio: std (logp - logp_old + |mean - mean_old|^2 / (2 std^2)).

    Computed as mean_i (x_next - mean_old)_i (mean - mean_old)_i / std, which is the same number
    without the difference of two large squares, and exactly 0 where mean = mean_old.

    Args:
        x_next: [N, ...] where the step went.
        mean: [N, ...] the kernel's mean under the policy being trained; carries the gradient.
        mean_old: [N, ...] under the policy that took the step.
        std: the kernel's std > 0, with its factor sqrt(-dt); a scalar, or an array that
            broadcasts with x_next.

    Returns:
        [N] float32. Over x_next ~ N(mean_old, std^2) its mean is 0 and its variance
        |mean - mean_old|^2 / D^2 for D dimensions, whatever the std. Where mean = mean_old its
        gradient is std times that of `log_prob`.
    """
    x_next, mean, mean_old, std = (
        jnp.asarray(a, jnp.float32) for a in (x_next, mean, mean_old, std)
    )
    x_next, mean_old, std = jax.lax.stop_gradient((x_next, mean_old, std))
    product = (x_next - mean_old) / std * (mean - mean_old)
    return jnp.mean(product, axis=tuple(range(1, product.ndim)))


def step_weight(
    sigma: Float[ArrayLike, "*s"], sigma_next: Float[ArrayLike, "*s"]
) -> Float[Array, "*s"]:
    """What a step's loss is multiplied by: 1 / (sigma - sigma_next).

    The kernel's mean moves with the velocity in proportion to dt, so without this a long step
    counts more. For `flow_sde` the factor is dt (1 + a^2 / 2), or dt where sigma = 1.

    The weights are not normalised over the steps: over a whole schedule of T steps their mean is
    at least T. Adam does not notice; gradient clipping and a KL term beside the loss do.

    Args:
        sigma: noise level before the step, any shape.
        sigma_next: after it, below sigma.

    Returns:
        float32 of sigma's shape, without gradient.
    """
    return 1.0 / (jnp.asarray(sigma, jnp.float32) - jnp.asarray(sigma_next, jnp.float32))


def guarded_surrogate(
    log_ratio: Float[Array, "..."],
    advantages: Float[Array, "..."],
    weight: Float[Array, "..."],
    clip_low: Scalar,
    clip_high: Scalar,
) -> Float[Array, "..."]:
    """Guard's loss of each sample: w max(-A r, -A clip(r, 1 - e_low, 1 + e_high)).

    Args:
        log_ratio: [...] of `normalised_log_ratio`.
        advantages: [...].
        weight: `step_weight` of the samples' steps; broadcasts with log_ratio.
        clip_low: e_low >= 0. The authors use 2e-6 to 4e-6: log_ratio is std times what GRPO clips
            at 1e-4, and centred.
        clip_high: e_high >= 0.

    Returns:
        [...] float32. Where log_ratio is 0 its gradient is that of -w A log_ratio.
    """
    return weight * clipped_surrogate(log_ratio, 0.0, advantages, clip_low, clip_high)
