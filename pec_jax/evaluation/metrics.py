"""Measures of diversity of finished images, and how sure one can be of a mean. NumPy, on the host.

Features are [..., K, d]: K images of one prompt. Every measure is taken within a prompt, so that
different prompts do not pass for diversity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

METRICS = ("euclidean", "cosine")


class Interval(NamedTuple):
    """A statistic and its confidence interval."""

    value: float
    low: float
    high: float


class Moments(NamedTuple):
    """Mean and covariance of features: all that a Gaussian fitted to them knows."""

    mean: np.ndarray  # [d]
    covariance: np.ndarray  # [d, d]


def moments(features: np.ndarray) -> Moments:
    """Of all images, whatever their prompts.

    Args:
        features: [..., d], at least two images.
    """
    rows = _checked(features).reshape(-1, features.shape[-1])
    return Moments(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


def frechet_distance(one: Moments, other: Moments) -> float:
    """How far images as a whole have moved: the squared 2-Wasserstein distance of two Gaussians.

    |m - m'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2)

    Source: Dowson and Landau 1982; of Inception's features it is the FID (Heusel et al. 2017).
    With fewer images than dimensions it is biased, in the same way for everything that is measured
    on as many.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    between = np.linalg.eigvalsh(root @ other.covariance @ root)
    trace = np.trace(one.covariance) + np.trace(other.covariance)
    shift = np.sum((one.mean - other.mean) ** 2)
    return float(max(shift + trace - 2.0 * np.sqrt(np.maximum(between, 0.0)).sum(), 0.0))


def mean_pairwise_distance(features: np.ndarray, metric: str = "euclidean") -> np.ndarray:
    """Mean distance between two different images of a prompt.

    2 / (K (K - 1)) sum_{i < j} dist(f_i, f_j)

    Args:
        features: [..., K, d].
        metric: "euclidean", |f_i - f_j| in the unit of the features, or "cosine",
            1 - cos(f_i, f_j) in [0, 2].

    Returns:
        [...] float64.

    Raises:
        ValueError: for fewer than 2 images or an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
    features = _checked(features)
    num_images = features.shape[-2]
    if metric == "cosine":
        distances = 1.0 - _cosine_similarity(features)
    else:
        distances = np.stack(
            [np.linalg.norm(features - row[..., None, :], axis=-1) for row in _rows(features)],
            axis=-2,
        )
    i, j = np.triu_indices(num_images, k=1)
    return distances[..., i, j].mean(axis=-1)


def vendi_score(features: np.ndarray) -> np.ndarray:
    """The effective number of different images: from 1 (all alike) to K (all orthogonal).

    exp(-sum_i l_i log l_i), l_i the eigenvalues of the cosine-similarity matrix divided by K.

    Args:
        features: [..., K, d]; normalised here.

    Returns:
        [...] float64.

    Raises:
        ValueError: for fewer than 2 images.

    Source: Friedman and Dieng 2023, The Vendi Score (arXiv 2210.02410), definition 3.1.
    """
    features = _checked(features)
    eigenvalues = np.linalg.eigvalsh(_cosine_similarity(features) / features.shape[-2])
    eigenvalues = np.maximum(eigenvalues, 0.0)  # rounding makes some a little negative
    return np.exp(_entropy(eigenvalues))


def unit_variance(features: np.ndarray) -> np.ndarray:
    """Mean squared distance of unit features to their mean, between 0 and 1.

    Args:
        features: [..., K, d]; normalised here.

    Returns:
        [...] float64.
    """
    features = _checked(features)
    unit = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return np.square(unit - unit.mean(axis=-2, keepdims=True)).sum(axis=-1).mean(axis=-1)


def colour_histogram_entropy(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Entropy of which colours (or other classes) the images of a prompt show.

    -sum_c p_c log p_c, p_c the share of the images of class c.

    Args:
        labels: [..., K] int in [0, num_classes), or -1 where no object was found: those images
            are left out.
        num_classes: the maximum is log(num_classes), reached only if K is at least as many.

    Returns:
        [...] float64, nats; 0 where nothing was found.

    Raises:
        ValueError: for a label outside [-1, num_classes).
    """
    labels = np.asarray(labels)
    if labels.size and not (labels.min() >= -1 and labels.max() < num_classes):
        raise ValueError(
            f"Labels lie in [{labels.min()}, {labels.max()}], outside [-1, {num_classes})."
        )
    counts = (labels[..., None] == np.arange(num_classes)).sum(axis=-2)
    return _entropy(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1))


def bootstrap_interval(
    values: np.ndarray,
    *,
    seed: int,
    level: float = 0.95,
    num_resamples: int = 2000,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> Interval:
    """Percentile bootstrap over prompts.

    Prompts, and not images, are resampled: images of one prompt are not independent.

    Args:
        values: [P], one number per prompt.
        seed: of the resampling.
        level: of confidence, in (0, 1).
        num_resamples: how many sets of P prompts are drawn with replacement.
        statistic: of a set; called with `axis`.

    Returns:
        The statistic of `values` itself, and the interval's ends.

    Raises:
        ValueError: for values that are not a non-empty vector, or a level outside (0, 1).

    Source: Efron 1979, Bootstrap methods: another look at the jackknife.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values have shape {values.shape}: give one number per prompt, [P].")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: it must lie between 0 and 1, e.g. 0.95.")
    draws = np.random.default_rng(seed).integers(values.size, size=(num_resamples, values.size))
    resampled = statistic(values[draws], axis=-1)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return Interval(float(statistic(values, axis=-1)), float(low), float(high))


def _cosine_similarity(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    unit = features / np.maximum(norms, 1e-12)
    return unit @ np.swapaxes(unit, -1, -2)


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    logs = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return -(probabilities * logs).sum(axis=-1)


def _rows(features: np.ndarray):
    return np.moveaxis(features, -2, 0)


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim < 2 or features.shape[-2] < 2:
        raise ValueError(
            f"Features of shape {features.shape} hold no group of at least 2 images [..., K, d]: "
            "evaluate more images per prompt."
        )
    return features
