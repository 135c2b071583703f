"""Heads that are one affine map: linear layers in a row, without an activation between them.

ImageReward's and both aesthetic predictors' are such; what lies between their layers is dropout,
which does nothing when they score. The product of the layers is taken once, in float64.
"""

from __future__ import annotations

import re

import numpy as np

from pec_jax.weights.tensors import Tensors, WeightsError

_LAYER = re.compile(r"(?:mlp\.)?(?:layers|scoring_head)\.(\d+)\.(weight|bias)")


def affine_head(tensors: Tensors) -> dict[str, np.ndarray]:
    """y = x . kernel + bias of a stack of linear layers, last to a single number.

    Args:
        tensors: with names such as `layers.0.weight` [out, in] and `layers.0.bias` [out], also
            below `mlp.`, or with `scoring_head` for `layers`; others are left alone.

    Returns:
        {"kernel": [d], "bias": []}, float32.

    Raises:
        WeightsError: no such layers, or layers that do not fit one another.
    """
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name in tensors:
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = np.asarray(tensors[name], np.float64)
    try:
        kernel: np.ndarray | None = None
        bias = np.zeros(0)
        for index in sorted(layers):
            weight, more = layers[index]["weight"], layers[index]["bias"]
            bias = more if kernel is None else weight @ bias + more
            kernel = weight if kernel is None else weight @ kernel
        if kernel is None:
            raise KeyError("there is none")
        (row,), (number,) = kernel, bias
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{tensors.directory}: no head of linear layers `layers.N` that end in one number "
            f"({error})"
        ) from error
    return {"kernel": row.astype(np.float32), "bias": np.float32(number)}
