"""Matrices that resample one axis of an image or of a grid of embeddings.

Two conventions are in use. Pillow's, which torch calls antialiased, widens the filter where the
axis shrinks and cuts it at the borders. Plain interpolation keeps the filter's width and repeats
the border pixels; its cubic is a little sharper.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic; a = -1/2 in Pillow."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# Pillow's number of a filter -> the filter and its half-width.
FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    2: (_bilinear, 1.0),
    3: (_bicubic, 2.0),
}


def resize_weights(size: int, new_size: int, resample: int) -> np.ndarray:
    """The matrix that resamples one axis, smoothed by the scale where it shrinks.

    Args:
        size: pixels of the axis.
        new_size: pixels wanted.
        resample: Pillow's number of the filter, 2 (bilinear) or 3 (bicubic).

    Returns:
        [new_size, size] float64; rows sum to one, also at the borders, where the filter is cut.

    Source: Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", equation 4
    with a = -1/2; cutting and scaling of the filter as in Pillow's `Image.resize`.
    """
    function, half_width = FILTERS[resample]
    scale = size / new_size
    stretch = max(scale, 1.0)
    centers = (np.arange(new_size) + 0.5) * scale
    # Pillow cuts the filter at whole pixels, half a pixel around its support.
    first = np.floor(centers - half_width * stretch + 0.5)
    last = np.floor(centers + half_width * stretch + 0.5)
    pixels = np.arange(size)
    weights = function((pixels[None, :] + 0.5 - centers[:, None]) / stretch)
    inside = (pixels[None, :] >= first[:, None]) & (pixels[None, :] < last[:, None])
    weights = np.where(inside, weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def cubic_weights(size: int, new_size: int) -> np.ndarray:
    """The matrix that interpolates one axis with a cubic, a = -3/4, not smoothed.

    Args:
        size: entries of the axis.
        new_size: entries wanted.

    Returns:
        [new_size, size] float64; rows sum to one, the border entries stand for all beyond.

    Source: Keys 1981, equation 4; `torch.nn.functional.interpolate(mode="bicubic")`.
    """
    centers = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-1, 3)  # [new_size, 4]
    weights = _bicubic(centers[:, None] - taps, a=-0.75)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size)[:, None], np.clip(taps, 0, size - 1)), weights)
    return matrix
