"""Reading LoRA files of PEFT, diffusers and others as networks take them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from absl import logging
from flax import traverse_util

from pec_jax.models.lora import Adapter, linear_layers
from pec_jax.weights import lora_names
from pec_jax.weights.lora_files import LISTED, find_lora
from pec_jax.weights.lora_names import ALPHA, BIAS, MAGNITUDE, PEFT_PREFIX, A, B, Layer, Layers
from pec_jax.weights.lora_scale import scales
from pec_jax.weights.lora_settings import Settings, adapter_settings
from pec_jax.weights.tensors import TensorFiles, WeightsError, read_file

PyTree = Any
Names = dict[str, dict[str, str]]  # module -> part of its adapter -> tensor
Widths = Mapping[str, tuple[int, int]]  # layer of the network -> (in, out)
MAX_RANK = 4096  # of a config too; bounds what zeros are added to the layers of a run


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What a file holds, by its own names."""

    file: Path
    tensors: TensorFiles
    names: Names
    settings: Settings | None


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module of a file: its tensors by part, its rank, its factor, and the layers that it is."""

    tensors: Mapping[str, str]
    rank: int
    scale: float
    layers: tuple[Layer, ...]


def read_lora(path: str | os.PathLike[str], params: PyTree) -> Adapter:
    """Reads a LoRA, whoever wrote it.

    Ranks may differ between the layers of a scanned run, and layers may be left out: what is
    missing is filled with zeros, which add nothing to a b.

    Args:
        path: a safetensors file, or a directory that holds one, see `find_lora`.
        params: the collection "params" of the network, arrays or abstract.

    Returns:
        fp32 numpy arrays, the factor alpha / r (or alpha / sqrt(r), if the file says so) folded
        into b and the biases.

    Raises:
        WeightsError: nothing to read, a pickle, a truncated file, an adapter of another kind,
            other modules or shapes than the network's, half a pair, no usable alpha, numbers that
            are not finite; the message names file and tensor.

    Source: the loaders of diffusers 0.42 (loaders/lora_pipeline.py, loaders/peft.py).
    """
    kernels = traverse_util.flatten_dict(nn.unbox(params))
    widths = {
        name: tuple(kernels[(*layer, "kernel")].shape[-2:])
        for layer, names in linear_layers(params).items()
        for name in names
    }
    contents = _open(find_lora(path), widths)
    return _stacked(contents, _modules(contents, widths), params)


def _open(file: Path, widths: Widths) -> _Contents:
    tensors = read_file(file)
    names = _by_module(tensors, file)
    settings = adapter_settings(file, required=_is_of_peft(names, widths))
    names = _targeted(names, settings)
    _check_kind(file, names, settings)
    return _Contents(file, tensors, names, settings)


def _by_module(tensors: TensorFiles, file: Path) -> Names:
    """The tensors by module and part, every name checked before a tensor is read."""
    found: Names = {}
    of_text = []
    for name in tensors:
        if lora_names.is_of_text_encoder(name):
            of_text.append(name)
            continue
        parsed = lora_names.parse(name)
        if parsed is None:
            _check_unknown(tensors, name)
            continue
        module, part = parsed
        if (first := found.setdefault(module, {}).setdefault(part, name)) != name:
            raise WeightsError(
                f"{file}: holds the {part} of {module!r} twice, as {first!r} and {name!r}; keep "
                "one adapter alone"
            )
    # Some programs always write the text encoders' too; they do nothing if they are zero.
    if used := [n for n in of_text if not n.endswith(f".{ALPHA}") and _read(tensors, n).any()]:
        raise WeightsError(
            f"{file}: {used[0]!r} adapts a text encoder, which is not supported; save the file "
            "without the tensors whose names begin with 'text_encoder' or 'lora_te'"
        )
    if not found:
        raise WeightsError(f"{file}: holds no tensors of a LoRA")
    return found


def _check_unknown(tensors: TensorFiles, name: str) -> None:
    """Raises WeightsError for a tensor that is no part of a LoRA, unless it changes nothing."""
    if lora_names.is_a_change(name) and not _read(tensors, name).any():
        return
    kind = lora_names.other_kind(name)
    known = f"MODULE.{A}, MODULE.{B}, MODULE.{ALPHA} and their other spellings"
    reason = f"is {kind}, which is not supported" if kind else f"is none of {known}"
    raise WeightsError(f"{tensors.file(name)}: {name!r} {reason}")


def _is_of_peft(names: Names, widths: Widths) -> bool:
    """Whether PEFT wrote the tensors, so that alpha can only stand in its settings.

    Trainers with the models' own names have its prefix too, but mean alpha = r, as diffusers reads
    them.
    """
    parts = [(part, tensor) for parts in names.values() for part, tensor in parts.items()]
    return (
        any(PEFT_PREFIX in tensor for _, tensor in parts)
        and all(part != ALPHA for part, _ in parts)
        and any(module in widths for module in names)
    )


def _targeted(names: Names, settings: Settings | None) -> Names:
    """Without what PEFT leaves lying because its settings do not name it."""
    if settings is None:
        return names
    targeted = {module: parts for module, parts in names.items() if settings.targets(module)}
    if left := sorted(set(names) - set(targeted)):
        logging.warning(
            "%s: target_modules does not name %s, whose tensors PEFT ignores; so they are ignored.",
            settings.source,
            _listing(left),
        )
    if not targeted:
        raise WeightsError(f"{settings.source}: target_modules names no module of the file")
    return targeted


def _check_kind(file: Path, names: Names, settings: Settings | None) -> None:
    """Raises WeightsError where settings and tensors tell of different kinds of adapter."""
    for part, key in ((MAGNITUDE, "use_dora"), (BIAS, "lora_bias")):
        having = [module for module, parts in names.items() if part in parts]
        lacking = sorted(set(names) - set(having))
        if settings is not None and having and not settings.values.get(key):
            raise WeightsError(
                f"{settings.source}: {key} is not set, but the file holds "
                f"{names[having[0]][part]!r}, which PEFT would ignore: set it, or drop such tensors"
            )
        stated = settings is not None and settings.values.get(key)
        if part == MAGNITUDE and (having or stated) and lacking:
            raise WeightsError(
                f"{file}: {lacking[0]!r} lacks the {part} of an adapter with {key} (DoRA); fetch "
                "the file again"
            )


def _layers(contents: _Contents, widths: Widths) -> dict[str, tuple[Layer, ...]]:
    """Module -> the layers of the network that it is; every layer is adapted once."""
    file, layers = contents.file, Layers(widths)
    found = {module: layers.find(module) for module in contents.names}
    if unknown := sorted(module for module, ours in found.items() if not ours):
        has = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in widths})
        raise WeightsError(
            f"{file}: adapts {len(unknown)} modules that the network does not have, such as "
            f"{_listing(unknown)}; it has {_listing(has)}: the LoRA belongs to another model"
        )
    seen: dict[str, str] = {}
    for module, ours in found.items():
        for layer in ours:
            if (other := seen.setdefault(layer.name, module)) != module:
                raise WeightsError(
                    f"{file}: adapts {layer.name!r} twice, as {other!r} and {module!r}; keep one"
                )
    return found


def _modules(contents: _Contents, widths: Widths) -> list[_Module]:
    """The modules, all shapes checked, with the factor of each."""
    layers, ranks, alphas = _layers(contents, widths), {}, {}
    for module, parts in contents.names.items():
        ours = [widths[layer.name] for layer in layers[module]]
        ranks[module] = _rank(contents, module, (ours[0][0], sum(out for _, out in ours)))
        if ALPHA in parts:
            alpha = _read(contents.tensors, parts[ALPHA], finite=False)
            alphas[module] = float(alpha.reshape(()))
    factors = scales(contents.file, ranks, contents.settings, alphas)
    return [
        _Module(parts, ranks[module], factors[module], layers[module])
        for module, parts in contents.names.items()
    ]


def _rank(contents: _Contents, module: str, width: tuple[int, int]) -> int:
    """The rank of a module that is [width[0] -> width[1]], the shapes of its tensors checked."""
    file, tensors, parts = contents.file, contents.tensors, contents.names[module]
    for part in (A, B):
        if part not in parts:
            raise WeightsError(f"{file}: {module!r} lacks its {part}; fetch the file again")
    a, b = tensors.shape(parts[A]), tensors.shape(parts[B])
    rank = a[0] if a else 0
    if a != (rank, width[0]) or b != (width[1], rank) or not 1 <= rank <= MAX_RANK:
        raise WeightsError(
            f"{file}: {parts[A]!r} has shape {list(a)} and {parts[B]!r} {list(b)}, expected "
            f"[r, {width[0]}] and [{width[1]}, r] with r from 1 to {MAX_RANK}; the LoRA belongs "
            "to another model"
        )
    if ALPHA in parts and math.prod(tensors.shape(parts[ALPHA])) != 1:
        raise WeightsError(f"{file}: {parts[ALPHA]!r} must hold one number; fetch the file again")
    for part in (BIAS, MAGNITUDE):
        if part in parts and tensors.shape(parts[part]) != (width[1],):
            raise WeightsError(
                f"{file}: {parts[part]!r} has shape {list(tensors.shape(parts[part]))}, expected "
                f"[{width[1]}]; the LoRA belongs to another model"
            )
    return rank


def _stacked(contents: _Contents, modules: Sequence[_Module], params: PyTree) -> Adapter:
    """The modules as the network has its layers, those of a run on one another."""
    tensors = contents.tensors
    places = {layer.name: (module, layer) for module in modules for layer in module.layers}
    kernels = traverse_util.flatten_dict(nn.unbox(params))
    factors, biases, magnitudes = {}, {}, {}
    for path, names in linear_layers(params).items():
        found = [(i, *places[name]) for i, name in enumerate(names) if name in places]
        if not found:
            continue
        *lead, fan_in, fan_out = kernels[(*path, "kernel")].shape
        rank = max(module.rank for _, module, _ in found)
        a = np.zeros((len(names), fan_in, rank), np.float32)
        b = np.zeros((len(names), rank, fan_out), np.float32)
        bias = np.zeros((len(names), fan_out), np.float32)
        magnitude = np.full((len(names), fan_out), np.nan, np.float32)
        for i, module, layer in found:
            a[i, :, : module.rank] = _read(tensors, module.tensors[A]).T
            b[i, : module.rank] = layer.of(_read(tensors, module.tensors[B], module.scale)).T
            if BIAS in module.tensors:
                bias[i] = layer.of(_read(tensors, module.tensors[BIAS], module.scale))
            if MAGNITUDE in module.tensors:
                magnitude[i] = layer.of(_read(tensors, module.tensors[MAGNITUDE]))
        factors[(*path, "a")] = a.reshape(*lead, fan_in, rank)
        factors[(*path, "b")] = b.reshape(*lead, rank, fan_out)
        if any(BIAS in module.tensors for _, module, _ in found):
            if (*path, "bias") not in kernels:
                raise WeightsError(
                    f"{contents.file}: adapts the bias of {names[0]!r}, which has none"
                )
            biases[(*path, "bias")] = bias.reshape(*lead, fan_out)
        if any(MAGNITUDE in module.tensors for _, module, _ in found):
            magnitudes[(*path, "magnitude")] = magnitude.reshape(*lead, fan_out)
    return Adapter(*map(traverse_util.unflatten_dict, (factors, biases, magnitudes)))


def _read(
    tensors: TensorFiles, name: str, scale: float = 1.0, *, finite: bool = True
) -> np.ndarray:
    """A tensor in fp32, times a factor; WeightsError if a number is NaN or infinite then."""
    with np.errstate(over="ignore", invalid="ignore"):
        array = tensors[name].astype(np.float32) * np.float32(scale)
    if finite and not np.isfinite(array).all():
        raise WeightsError(
            f"{tensors.file(name)}: {name!r} holds numbers that are NaN or infinite; the training "
            "that wrote it has failed: take an earlier checkpoint"
        )
    return array


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(name) for name in names[:LISTED]) + more
