"""Low-rank adapters of linear layers, W' = W + (alpha / r) a b (Hu et al. 2021, arXiv 2106.09685).

An adapter is a tree beside the parameters, {"a": [in, r], "b": [r, out]} for each layer that is
adapted, and is passed to a network as the collection "lora" (see `layers.Dense`). Layers of a
scanned run are adapted together, with a leading layer axis.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from pec_jax.models.layers import RUN_NAME, expand_runs

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a LoRA file does to a network, which may be more than W + a b.

    The leaves are stacked over the layers of a scanned run, as the network's own are.

    Attributes:
        factors: {"a": [*, in, r], "b": [*, r, out]} as from `scaled`.
        biases: {"bias": [*, out]}, what is added to the biases of some of these layers.
        magnitudes: {"magnitude": [*, out]}, the norms that the columns of W + a b are brought to
            (DoRA, Liu et al. 2024, arXiv 2402.09353); NaN where a layer of a run is not adapted.
    """

    factors: PyTree
    biases: PyTree = dataclasses.field(default_factory=dict)
    magnitudes: PyTree = dataclasses.field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is W + a b and nothing else."""
        return not self.biases and not self.magnitudes


def attach(variables: PyTree, adapter: Adapter) -> PyTree:
    """The network's variables with an adapter in place.

    Factors are put beside the weights. What is no low-rank addition is merged into them: biases,
    and DoRA, which scales the columns of W itself.

    Args:
        variables: {"params": ..., ...}, unboxed.
        adapter: of the network's own layers.

    Returns:
        New variables with a collection "lora"; changed weights keep their dtype.
    """
    params = dict(traverse_util.flatten_dict(variables["params"]))
    factors = dict(traverse_util.flatten_dict(adapter.factors))
    for path, change in traverse_util.flatten_dict(adapter.biases).items():
        params[path] = (params[path] + change).astype(params[path].dtype)
    for (*layer, _), magnitude in traverse_util.flatten_dict(adapter.magnitudes).items():
        kernel = params[(*layer, "kernel")]
        a, b = (jnp.asarray(factors.pop((*layer, half))) for half in "ab")
        column = jnp.asarray(magnitude)[..., None, :]
        merged = kernel + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        norm = jnp.linalg.norm(merged, axis=-2, keepdims=True)
        merged *= jnp.where(jnp.isnan(column), 1.0, column / norm)
        params[(*layer, "kernel")] = merged.astype(kernel.dtype)
    return {
        **variables,
        "params": traverse_util.unflatten_dict(params),
        "lora": traverse_util.unflatten_dict(factors),
    }


def linear_layers(params: PyTree) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The layers that an adapter can be attached to.

    Args:
        params: the collection "params", arrays or abstract.

    Returns:
        Module path -> its dotted torch names, one a layer of a scanned run.
    """
    found = {}
    for path, value in traverse_util.flatten_dict(nn.unbox(params)).items():
        stacked = any(RUN_NAME.fullmatch(part) for part in path)
        if path[-1] == "kernel" and len(value.shape) == 2 + stacked:
            found[path[:-1]] = tuple(expand_runs(path[:-1]))
    return found


def _select(params: PyTree, patterns: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Module path -> first torch name, of every layer that a pattern matches."""
    layers = linear_layers(params)
    selected = {}
    for pattern in patterns:
        matches = 0
        for path, names in layers.items():
            hits = [name for name in names if re.search(pattern, name)]
            if hits and len(hits) < len(names):
                raise ValueError(
                    f"LoRA pattern {pattern!r} matches {hits[0]!r} but not all of "
                    f"{names[0]!r} .. {names[-1]!r}, which are computed as one run: leave the "
                    "layer number out of the pattern, or name all of them"
                )
            if hits:
                selected[path] = names[0]
                matches += 1
        if not matches:
            available = sorted({re.sub(r"\.\d+\.", ".N.", n) for ns in layers.values() for n in ns})
            raise ValueError(
                f"LoRA pattern {pattern!r} matches no linear layer; available: "
                f"{', '.join(available)}"
            )
    return selected


def init(params: PyTree, patterns: Sequence[str], rank: int, key: Array) -> PyTree:
    """New adapters: a ~ N(0, 1/r^2), b = 0, so that the network starts unchanged.

    Args:
        params: the collection "params" of the network, arrays or abstract.
        patterns: regular expressions searched in dotted layer names, such as
            r"attn2?\\.to_(q|k|v)$"; a layer is adapted if any matches.
        rank: r, at least 1.
        key: PRNG key; a layer's draw depends on its name only, not on the other patterns.

    Returns:
        Tree of {"a": [*, in, r], "b": [*, r, out]} fp32.

    Raises:
        ValueError: rank below 1; no pattern; a pattern that matches nothing (the names available
            are listed) or only a part of a scanned run.

    Source: Hu et al. 2021, section 4.1; the Gaussian of std 1/r is that of diffusers' recipes.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, not {rank}")
    if not patterns:
        raise ValueError("LoRA needs at least one pattern that names the layers to adapt")
    flat = traverse_util.flatten_dict(nn.unbox(params))
    adapters = {}
    for path, name in _select(params, patterns).items():
        *lead, fan_in, fan_out = flat[(*path, "kernel")].shape
        layer_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        a = jax.random.normal(layer_key, (*lead, fan_in, rank), jnp.float32) / rank
        adapters[(*path, "a")] = a
        adapters[(*path, "b")] = jnp.zeros((*lead, rank, fan_out), jnp.float32)
    return traverse_util.unflatten_dict(adapters)


def logical_axes(
    kernels: Mapping[tuple[str, ...], Sequence[str | None]], adapters: PyTree
) -> PyTree:
    """The names of an adapter's axes: those of its layer's kernel, and "rank".

    Args:
        kernels: path of every leaf of the network's "params" -> the names of its axes.
        adapters: from `init`, arrays or abstract.

    Returns:
        A tree like `adapters`, with a tuple of names for each array.
    """
    axes = {}
    for path in traverse_util.flatten_dict(adapters):
        *lead, fan_in, fan_out = kernels[(*path[:-1], "kernel")]
        axes[path] = (*lead, fan_in, "rank") if path[-1] == "a" else (*lead, "rank", fan_out)
    return traverse_util.unflatten_dict(axes)


def scaled(lora: PyTree, alpha: float, rank: int) -> PyTree:
    """Folds the factor alpha / r into b, which is the form that networks and `merge` take.

    Args:
        lora: adapters as trained.
        alpha: LoRA's alpha.
        rank: r.

    Returns:
        A tree of the same structure, for the collection "lora".
    """
    factor = alpha / rank
    flat = traverse_util.flatten_dict(lora)
    return traverse_util.unflatten_dict(
        {path: value * factor if path[-1] == "b" else value for path, value in flat.items()}
    )


def merge(params: PyTree, lora_scaled: PyTree) -> PyTree:
    """W + a b for every adapted layer; the network then needs no adapter.

    Args:
        params: the collection "params", unboxed.
        lora_scaled: adapters from `scaled`.

    Returns:
        New params, each kernel in its own dtype; the product is fp32.

    Raises:
        ValueError: an adapter for a layer that the network does not have, or of another shape.
    """
    flat = dict(traverse_util.flatten_dict(params))
    adapters = traverse_util.flatten_dict(lora_scaled)
    for path in {path[:-1] for path in adapters}:
        kernel_path = (*path, "kernel")
        a, b = adapters[(*path, "a")], adapters[(*path, "b")]
        shape = (*a.shape[:-1], b.shape[-1])
        if kernel_path not in flat or tuple(flat[kernel_path].shape) != shape:
            found = flat[kernel_path].shape if kernel_path in flat else "no such layer"
            raise ValueError(
                f"LoRA adapter for {'.'.join(path)} of {list(shape)}: the network has {found}"
            )
        kernel = flat[kernel_path]
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        flat[kernel_path] = (kernel + delta).astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def count(lora: PyTree) -> int:
    """Number of trainable scalars in an adapter tree."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(lora))
