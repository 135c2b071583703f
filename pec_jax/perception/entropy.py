"""Perceptual entropy: how spread out the images of one prompt look to an encoder.

Each estimator maps features [..., K, d] of a group to surprisals [..., K] in nats per dimension:
h_k, an estimate of -log p(f_k) / d. Their mean is the estimate of the entropy H_perc / d, and
each image's own surprisal is its share of it, which is what a reward can pay.

| name       | model of p                                | where it is reliable             |
|------------|-------------------------------------------|----------------------------------|
| `gaussian` | isotropic Gaussian of fixed bandwidth     | always defined; the paper's      |
| `logdet`   | Gaussian of full covariance, plus a ridge | K > d; below, for comparisons    |
| `knn`      | none (k nearest neighbours)               | K > k, small d                   |

An image whose features are not finite is no sibling: its surprisal is nan, and those of the others
are what they would be without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pec_jax.perception.encoder import unit
from pec_jax.types import Scalar

_LOG_2PI = math.log(2.0 * math.pi)
# Without it a TPU multiplies float32 matrices in bfloat16, which is coarser than the ridge.
_EXACT = jax.lax.Precision.HIGHEST
SCALES = ("unit", "unit_sqrt_d")


def gaussian_surprisal(
    features: Float[ArrayLike, "*p k d"], bandwidth: Scalar
) -> Float[Array, "*p k"]:
    """Surprisal under an isotropic Gaussian around the group's mean.

    h_k = |f_k - mean f|^2 / (2 s^2 d) + 1/2 log(2 pi s^2)

    Its mean over the group is the group's variance in units of 2 s^2, plus a constant.

    Args:
        features: [..., K, d] float.
        bandwidth: s > 0, in the unit of the features; `schedule_bandwidth` gives the paper's.

    Returns:
        [..., K] float32, nats per dimension.

    Raises:
        ValueError: for a group of fewer than 2 images.

    Source: arXiv 2605.12112, perceptual entropy.
    """
    features, known = _checked(features)
    variance = jnp.square(jnp.asarray(bandwidth, jnp.float32))
    distance = jnp.mean(jnp.square(_centred(features, known)), axis=-1)
    surprisal = distance / (2.0 * variance) + 0.5 * (_LOG_2PI + jnp.log(variance))
    return jnp.where(known, surprisal, jnp.nan)


def logdet_surprisal(
    features: Float[ArrayLike, "*p k d"], eps: Scalar = 1e-4
) -> Float[Array, "*p k"]:
    """Surprisal under a Gaussian of full covariance, credited by leaving each image out.

    H = 1/(2 d) log det(2 pi e (Sigma + eps I)), Sigma the population covariance;
    h_k = H + c_k - mean c,  c_k = (K - 1) (H - H without k).

    The c_k are the jackknife's pseudo-values: with many images they tend to the Gaussian's own
    -log p(f_k) / d, and with K <= d, where all in-sample Mahalanobis distances are equal, they
    still tell the images apart. H without k is taken around the mean of the others, with the
    same absolute ridge on the scatter matrix, which makes it a rank-one update:

    H - H without k = -1/(2 d) log(1 - K/(K - 1) l_k) + const,
    l_k = (f_k - mean)^T (K Sigma + K eps I)^-1 (f_k - mean).

    Args:
        features: [..., K, d] float.
        eps: ridge on the variances, > 0. It is raised to 1e-6 of the total variance where that
            is more, below which float32 cannot tell the matrix from a singular one.

    Returns:
        [..., K] float32, nats per dimension.

    Raises:
        ValueError: for a group of fewer than 2 images, or eps that is not positive.
    """
    if isinstance(eps, int | float) and not eps > 0:
        raise ValueError(f"eps is {eps}: the log-determinant of a group needs a positive ridge.")
    features, known = _checked(features)
    num_images, dim = features.shape[-2:]
    centred, count = _centred(features, known), _count(known)
    total_variance = jnp.sum(jnp.square(centred), axis=(-2, -1)) / count
    ridge = jnp.maximum(eps, 1e-6 * jax.lax.stop_gradient(total_variance))  # [...]
    group = _Group(centred, known, count, ridge)
    solve = _from_gram if num_images <= dim else _from_covariance
    log_det, log_rest = solve(group, total_variance)
    entropy = 0.5 * (_LOG_2PI + 1.0) + log_det / (2.0 * dim)
    credit = -(count[..., None] - 1) / (2.0 * dim) * jnp.where(known, log_rest, 0.0)
    credit = _centred(credit[..., None], known)[..., 0]
    return jnp.where(known, entropy[..., None] + credit, jnp.nan)


def knn_surprisal(
    features: Float[ArrayLike, "*p k d"], k: int = 3, min_distance: float = 1e-4
) -> Float[Array, "*p k"]:
    """Surprisal by the distance to the k-th nearest neighbour (Kozachenko-Leonenko).

    h_i = log rho_k(i) + (psi(K) - psi(k) + log V_d) / d, V_d the volume of the unit ball.

    Args:
        features: [..., K, d] float.
        k: which neighbour, 1 <= k < K. Small k follows fine structure, large k is steadier.
        min_distance: rho is not let below this, so that a duplicate is worth very little but
            not minus infinity; in the unit of the features.

    Returns:
        [..., K] float32, nats per dimension.

    Raises:
        ValueError: for a group of fewer than 2 images, or k outside [1, K).

    Source: Kozachenko and Leonenko 1987; Kraskov et al. 2004 (cond-mat/0305641), eq. 20.
    """
    features, known = _checked(features)
    num_images, dim = features.shape[-2:]
    if not 1 <= k < num_images:
        raise ValueError(
            f"k is {k}, but an image of a group of {num_images} has {num_images - 1} neighbours: "
            "lower k, or raise the number of images per prompt."
        )
    # Differences and not a Gram matrix, which would lose small distances to cancellation.
    difference = features[..., :, None, :] - features[..., None, :, :]
    squared = jnp.sum(jnp.square(difference), axis=-1)  # [..., K, K]
    no_neighbour = jnp.eye(num_images, dtype=bool) | ~known[..., None, :]
    squared = jnp.where(no_neighbour, jnp.inf, squared)
    rho_squared = jnp.sort(squared, axis=-1)[..., k - 1]
    log_rho = 0.5 * jnp.log(jnp.maximum(rho_squared, min_distance**2))
    log_volume = 0.5 * dim * math.log(math.pi) - gammaln(0.5 * dim + 1.0)
    log_count = digamma(_count(known))[..., None]
    surprisal = log_rho + (log_count - digamma(float(k)) + log_volume) / dim
    return jnp.where(known & jnp.isfinite(rho_squared), surprisal, jnp.nan)


ESTIMATORS: dict[str, Callable[..., Array]] = {
    "gaussian": gaussian_surprisal,
    "logdet": logdet_surprisal,
    "knn": knn_surprisal,
}


def get_estimator(name: str) -> Callable[..., Array]:
    """The estimator of that name: (features [..., K, d], its option by keyword) -> [..., K].

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"Unknown estimator {name!r}; choose one of {', '.join(ESTIMATORS)}.")
    return ESTIMATORS[name]


def perceptual_variance(features: Float[ArrayLike, "*p k d"]) -> Float[Array, "*p"]:
    """Mean squared distance of a group's features to their mean: the trace of the covariance.

    1/K sum_k |f_k - mean f|^2, summed (not averaged) over the d dimensions.

    Args:
        features: [..., K, d] float.

    Returns:
        [...] float32; for unit features between 0 and 1.
    """
    features, known = _checked(features)
    squared = jnp.sum(jnp.square(_centred(features, known)), axis=-1)
    return jnp.sum(squared, axis=-1) / _count(known)


def scale_features(features: Float[ArrayLike, "*n d"], scale: str) -> Float[Array, "*n d"]:
    """Features on the unit sphere, or on the sphere of radius sqrt(d).

    The second gives each dimension a mean square of 1, so that entropies per dimension do not
    depend on how wide the encoder is.

    Args:
        features: [..., d] as the encoder gives them.
        scale: "unit" or "unit_sqrt_d".

    Returns:
        [..., d] float32. A zero vector stays zero.

    Raises:
        ValueError: for an unknown scale, listing the known ones.
    """
    if scale not in SCALES:
        raise ValueError(f"Unknown feature scale {scale!r}; choose one of {', '.join(SCALES)}.")
    features = unit(jnp.asarray(features, jnp.float32))
    return features if scale == "unit" else math.sqrt(features.shape[-1]) * features


def schedule_bandwidth(stds: Float[ArrayLike, " s"]) -> Float[Array, ""]:
    """The bandwidth that makes the perceptual Gaussian as wide as the policy's.

    s = sqrt(mean_t std_t^2)

    Args:
        stds: [S] the std of each trained step (`flow.transition.schedule_stds`).

    Returns:
        [] float32.
    """
    return jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(stds, jnp.float32))))


class _Group(NamedTuple):
    """A group of images as its Gaussian sees it."""

    centred: Array  # [..., K, d]; 0 where an image is not known
    known: Array  # [..., K] bool
    size: Array  # [...] fp32, number of the known
    ridge: Array  # [...]


def _from_gram(group: _Group, total_variance: Array) -> tuple[Array, Array]:
    """log det(Sigma + ridge I) [...] and log(1 - n/(n-1) l_k) [..., K] from the K x K matrix.

    Centring makes the vector of ones a null direction of G = F F^T / n, which would drown the
    credit: [(G + ridge I)^-1]_kk holds 1/(n ridge) of it, in all images alike. Lifting that
    direction to tau and taking it out again leaves the others alone.
    """
    centred, known, count, ridge = group
    num_images, dim = centred.shape[-2:]
    gram = jnp.einsum("...id,...jd->...ij", centred, centred, precision=_EXACT)
    gram = gram / count[..., None, None]
    tau = jax.lax.stop_gradient(total_variance)
    ones = (known[..., :, None] & known[..., None, :]).astype(jnp.float32)
    lifted = gram + (tau / count)[..., None, None] * ones + _diagonal(ridge, num_images)
    log_det, half_inverse = _half_solve(lifted, jnp.broadcast_to(jnp.eye(num_images), gram.shape))
    log_det += (dim - num_images) * jnp.log(ridge) - jnp.log1p(tau / ridge)
    inverse_diagonal = jnp.sum(jnp.square(half_inverse), axis=-2)
    rest = inverse_diagonal - 1.0 / (count * (ridge + tau))[..., None]
    scale = ridge * count / (count - 1)
    return log_det, jnp.log(rest) + jnp.log(scale)[..., None]


def _from_covariance(group: _Group, total_variance: Array) -> tuple[Array, Array]:
    """The same two from the d x d matrix, the smaller one where K > d."""
    del total_variance
    centred, _, count, ridge = group
    dim = centred.shape[-1]
    covariance = jnp.einsum("...ki,...kj->...ij", centred, centred, precision=_EXACT)
    covariance = covariance / count[..., None, None]
    log_det, half_solved = _half_solve(
        covariance + _diagonal(ridge, dim), jnp.swapaxes(centred, -1, -2)
    )
    leverage = jnp.sum(jnp.square(half_solved), axis=-2) / count[..., None]
    # Positive in exact arithmetic; a lone outlier far away brings it below rounding.
    rest = jnp.maximum(1.0 - (count / (count - 1))[..., None] * leverage, 1e-6)
    return log_det, jnp.log(rest)


def _half_solve(matrix: Array, right: Array) -> tuple[Array, Array]:
    """log det A [...] and L^-1 B [..., n, m] of A = L L^T [..., n, n] positive definite.

    Eliminates column by column. Not by LAPACK: since jaxlib 0.10 a batched call waits, on a thread
    of the CPU's pool, for tasks that it gives to the same pool, and as many calls at once as the
    pool has threads (the entropies of two encoders on two cores) wait for ever.
    """
    size = matrix.shape[-1]
    rows = jnp.arange(size)[:, None]

    def eliminate(j, table):  # [..., n, n + m]: [L^T | L^-1 B] in the rows above j
        row = jax.lax.dynamic_index_in_dim(table, j, axis=-2)  # [..., 1, n + m]
        column = jax.lax.dynamic_index_in_dim(table, j, axis=-1)  # [..., n, 1]
        scale = jax.lax.rsqrt(jax.lax.dynamic_index_in_dim(row, j, axis=-1))
        row, column = row * scale, column * scale
        return jnp.where(rows > j, table - column * row, jnp.where(rows == j, row, table))

    table = jnp.concatenate([matrix, right], axis=-1)
    table = jax.lax.fori_loop(0, size, eliminate, table)
    pivots = jnp.diagonal(table, axis1=-2, axis2=-1)
    return 2.0 * jnp.sum(jnp.log(pivots), axis=-1), table[..., size:]


def _diagonal(value: Array, size: int) -> Array:
    return value[..., None, None] * jnp.eye(size)


def _count(known: Bool[Array, "*p k"]) -> Float[Array, "*p"]:
    return jnp.sum(known, axis=-1, dtype=jnp.float32)


def _centred(x: Float[Array, "*p k d"], known: Bool[Array, "*p k"]) -> Float[Array, "*p k d"]:
    """x minus the mean of what is known, and 0 where nothing is; x is 0 there."""
    mean = jnp.sum(x, axis=-2, keepdims=True) / jnp.maximum(_count(known), 1.0)[..., None, None]
    return jnp.where(known[..., None], x - mean, 0.0)


def _checked(features: ArrayLike) -> tuple[Float[Array, "*p k d"], Bool[Array, "*p k"]]:
    """float32 features, 0 where an image's are not finite; and where they are."""
    features = jnp.asarray(features, jnp.float32)
    if features.ndim < 2 or features.shape[-2] < 2:
        raise ValueError(
            f"Features of shape {features.shape} hold no group of at least 2 images [..., K, d]: "
            "raise the number of images per prompt."
        )
    known = jnp.all(jnp.isfinite(features), axis=-1)
    return jnp.where(known[..., None], features, 0.0), known
