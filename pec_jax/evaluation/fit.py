"""The paper's relation between reward and perceptual entropy: R = -a exp(H) + b."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """R = -a exp(H) + b, and the share of the variance of R that it explains."""

    a: float
    b: float
    r2: float


def exponential_fit(rewards: Sequence[float], entropies: Sequence[float]) -> Fit:
    """Least squares, which is linear regression on exp(H).

    Args:
        rewards: [T] mean reward of each iteration.
        entropies: [T] perceptual entropy H, nats per dimension.

    Returns:
        The fit; all nan where fewer than 3 pairs are finite, or exp(H) or R does not vary.

    Source: arXiv 2605.12112, figure 3; the relation is Cui et al. 2025 (arXiv 2505.22617), eq. 2.
    """
    pairs = np.stack([np.asarray(rewards, np.float64), np.exp(np.asarray(entropies, np.float64))])
    reward, spread = pairs[:, np.isfinite(pairs).all(axis=0)]
    if reward.size < 3 or np.ptp(spread) == 0 or np.ptp(reward) == 0:
        return Fit(math.nan, math.nan, math.nan)
    slope = np.cov(spread, reward, bias=True)[0, 1] / np.var(spread)
    offset = reward.mean() - slope * spread.mean()
    residual = reward - (slope * spread + offset)
    return Fit(float(-slope), float(offset), float(1.0 - residual.var() / reward.var()))
