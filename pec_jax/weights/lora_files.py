"""LoRA files as diffusers and PEFT have them, written and read.

A file holds two matrices a layer, MODULE.lora_A.weight [r, in] and MODULE.lora_B.weight [out, r];
ours are their transposes, stacked over the layers of a scanned run. Module names come from the
parameters alone, so this holds for every network.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from pec_jax.models.layers import expand_runs
from pec_jax.models.lora import linear_layers
from pec_jax.weights.lora_scale import METADATA_KEY, PREFIX, adapter_settings, scales
from pec_jax.weights.tensors import TensorFiles, WeightsError, read_file, write_tensors

PyTree = Any
STEM = "pytorch_lora_weights"
FILE_NAMES = (f"{STEM}.safetensors", "adapter_model.safetensors")  # diffusers' and PEFT's
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PEFT_PREFIX = "base_model.model."
A, B, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
HALVES = {"a": A, "b": B}
TENSOR = re.compile(
    rf"({re.escape(PREFIX)}|{re.escape(PEFT_PREFIX)}|)(.+)\.(lora_[AB]\.weight|{ALPHA})"
)
TEXT_ENCODER = re.compile(r"text_encoder(_\d)?\.|lora_te\d?_")
MAX_RANK = 4096  # of a config too; bounds what zeros are added to the layers of a run
LISTED = 5  # names an error message shows


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """One layer's tensors in a file: their names, and the rank they agree on."""

    names: Mapping[str, str]  # A, B and perhaps ALPHA -> tensor
    rank: int


def lora_to_torch(lora: PyTree) -> dict[str, np.ndarray]:
    """The tensors of a LoRA file.

    Args:
        lora: adapters {"a": [*, in, r], "b": [*, r, out]} as trained.

    Returns:
        transformer.MODULE.lora_A.weight -> [r, in], transformer.MODULE.lora_B.weight -> [out, r],
        in the adapters' dtype; alpha is no tensor, see `write_lora`.
    """
    tensors = {}
    for (*modules, leaf), value in traverse_util.flatten_dict(lora).items():
        names, array = expand_runs(modules), np.asarray(jax.device_get(value))
        layers = array.reshape(len(names), *array.shape[-2:])
        for name, layer in zip(names, layers):
            tensors[f"{PREFIX}{name}.{HALVES[leaf]}"] = layer.T
    return tensors


def write_lora(
    directory: str | os.PathLike[str],
    lora: PyTree,
    alpha: float,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a LoRA that `pipe.load_lora_weights(directory)` of diffusers applies.

    Rank and alpha stand in the header: the loader of Stable Diffusion 3 takes them from nowhere
    else, and without them every loader assumes alpha = r.

    Args:
        directory: created if absent.
        lora: adapters as trained, W' = W + (alpha / r) a b, all of one rank r.
        alpha: LoRA's alpha.
        metadata: further notes for the header.

    Returns:
        The file written, `pytorch_lora_weights.safetensors`.

    Raises:
        ValueError: adapters of several ranks.
        OSError: the directory cannot be written; nothing is left behind.
    """
    tensors = lora_to_torch(lora)
    halves = {name: value for name, value in tensors.items() if name.endswith(A)}
    ranks = {value.shape[0] for value in halves.values()}
    if len(ranks) != 1:
        raise ValueError(f"LoRA to write must have one rank, not {sorted(ranks)}")
    settings = {
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "target_modules": sorted(n.removeprefix(PREFIX).removesuffix(f".{A}") for n in halves),
    }
    text = json.dumps({PREFIX + key: value for key, value in settings.items()})
    return write_tensors(directory, tensors, STEM, {METADATA_KEY: text, **(metadata or {})})


def read_lora(path: str | os.PathLike[str], params: PyTree) -> PyTree:
    """Reads a LoRA that diffusers or PEFT has written, as networks take it.

    Ranks may differ between the layers of a scanned run, and layers may be left out: what is
    missing is filled with zeros, which add nothing to a b.

    Args:
        path: a safetensors file, or a directory that holds one.
        params: the collection "params" of the network, arrays or abstract.

    Returns:
        {"a": [*, in, r], "b": [*, r, out]} fp32 numpy arrays, the factor alpha / r (or
        alpha / sqrt(r), if the file says so) folded into b, as by `lora.scaled`.

    Raises:
        WeightsError: nothing to read, a pickle, a truncated file, other modules or shapes than
            the network's, half a pair, no usable alpha; the message names file and tensor.

    Source: the loaders of diffusers 0.42 (loaders/lora_pipeline.py, loaders/peft.py).
    """
    file = find_lora(path)
    tensors = read_file(file)
    adapters = _adapters(tensors, file, _widths(params))
    peft = any(name.startswith(PEFT_PREFIX) for name in tensors)
    alphas = {
        module: float(tensors[adapter.names[ALPHA]].astype(np.float32).reshape(()))
        for module, adapter in adapters.items()
        if ALPHA in adapter.names
    }
    settings = adapter_settings(file, peft=peft and not alphas)
    ranks = {module: adapter.rank for module, adapter in adapters.items()}
    return _stack(tensors, adapters, scales(file, ranks, settings, alphas), params)


def find_lora(path: str | os.PathLike[str]) -> Path:
    """The safetensors file that a path stands for.

    Args:
        path: the file itself, or a directory: `pytorch_lora_weights.safetensors`,
            `adapter_model.safetensors`, or else its only safetensors file is taken.

    Raises:
        WeightsError: there is none, several, or only a pickle.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file())
        whole = [name for name in names if name.endswith(".safetensors")]
        found = [name for name in FILE_NAMES if name in whole] or whole
        if len(whole) > 1 and found is whole:
            raise WeightsError(f"{path}: holds {', '.join(whole[:LISTED])}; give one of the files")
        found = found or [name for name in names if Path(name).suffix in PICKLES]
        if not found:
            raise WeightsError(f"{path}: holds no LoRA ({' or '.join(FILE_NAMES)})")
        path /= found[0]
    if path.suffix in PICKLES:
        raise WeightsError(
            f"{path}: a pickle, which can run code when opened, is not read; save the LoRA as "
            "safetensors (save_lora_weights(..., safe_serialization=True))"
        )
    if not path.is_file():
        raise WeightsError(f"{path}: no such LoRA file or directory")
    return path


def _widths(params: PyTree) -> dict[str, tuple[int, int]]:
    """Torch name -> (in, out) of every layer that an adapter can be attached to."""
    kernels = traverse_util.flatten_dict(nn.unbox(params))
    return {
        name: tuple(kernels[(*path, "kernel")].shape[-2:])
        for path, names in linear_layers(params).items()
        for name in names
    }


def _adapters(
    tensors: TensorFiles, file: Path, widths: Mapping[str, tuple[int, int]]
) -> dict[str, _Adapter]:
    """Module -> its adapter, every name and shape checked before a tensor is read."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        module, part = _parse(name, file)
        if part in found.setdefault(module, {}):
            raise WeightsError(f"{file}: holds {name!r} under two names; fetch it again")
        found[module][part] = name
    if not found:
        raise WeightsError(f"{file}: holds no tensors")
    if unknown := sorted(set(found) - set(widths)):
        has = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in widths})
        raise WeightsError(
            f"{file}: adapts {len(unknown)} modules that the network does not have, such as "
            f"{_listing(unknown)}; it has {_listing(has)}: the LoRA belongs to another model"
        )
    return {
        module: _Adapter(names, _rank(tensors, file, module, names, widths[module]))
        for module, names in found.items()
    }


def _parse(name: str, file: Path) -> tuple[str, str]:
    """A tensor's module, and which part of its adapter it is."""
    if TEXT_ENCODER.match(name):
        raise WeightsError(
            f"{file}: {name!r} adapts a text encoder, which is not supported; save the "
            "transformer's part alone (save_lora_weights(transformer_lora_layers=...))"
        )
    match = TENSOR.fullmatch(name)
    if match is None:
        raise WeightsError(
            f"{file}: {name!r} is none of MODULE.{A}, MODULE.{B} and MODULE.{ALPHA}; other kinds "
            "of adapters are not supported, other names are translated by diffusers: "
            "pipe.load_lora_weights(...), then pipe.transformer.save_lora_adapter(DIRECTORY)"
        )
    return match[2], match[3]


def _rank(
    tensors: TensorFiles,
    file: Path,
    module: str,
    names: Mapping[str, str],
    width: tuple[int, int],
) -> int:
    for part in (A, B):
        if part not in names:
            raise WeightsError(f"{file}: {module!r} lacks its {part}; fetch the file again")
    a, b = tensors.shape(names[A]), tensors.shape(names[B])
    rank = a[0] if a else 0
    if a != (rank, width[0]) or b != (width[1], rank) or not 1 <= rank <= MAX_RANK:
        raise WeightsError(
            f"{file}: {names[A]!r} has shape {list(a)} and {names[B]!r} {list(b)}, expected "
            f"[r, {width[0]}] and [{width[1]}, r] with r from 1 to {MAX_RANK}; the LoRA belongs "
            "to another model"
        )
    if ALPHA in names and math.prod(tensors.shape(names[ALPHA])) != 1:
        raise WeightsError(f"{file}: {names[ALPHA]!r} must hold one number; fetch the file again")
    return rank


def _stack(
    tensors: TensorFiles,
    adapters: Mapping[str, _Adapter],
    scale: Mapping[str, float],
    params: PyTree,
) -> PyTree:
    flat = {}
    kernels = traverse_util.flatten_dict(nn.unbox(params))
    for path, names in linear_layers(params).items():
        rank = max((adapters[name].rank for name in names if name in adapters), default=0)
        if not rank:
            continue
        *lead, fan_in, fan_out = kernels[(*path, "kernel")].shape
        a = np.zeros((len(names), fan_in, rank), np.float32)
        b = np.zeros((len(names), rank, fan_out), np.float32)
        for i, name in enumerate(names):
            if (adapter := adapters.get(name)) is not None:
                a[i, :, : adapter.rank] = tensors[adapter.names[A]].T
                b[i, : adapter.rank] = tensors[adapter.names[B]].T
                b[i] *= scale[name]
        flat[(*path, "a")] = a.reshape(*lead, fan_in, rank)
        flat[(*path, "b")] = b.reshape(*lead, rank, fan_out)
    return traverse_util.unflatten_dict(flat)


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(name) for name in names[:LISTED]) + more
