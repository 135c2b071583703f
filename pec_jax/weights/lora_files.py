"""LoRA files: where they lie, and writing them as diffusers and PEFT have them.

A file holds two matrices a layer, MODULE.lora_A.weight [r, in] and MODULE.lora_B.weight [out, r];
ours are their transposes, stacked over the layers of a scanned run. Module names come from the
parameters alone, so this holds for every network. `lora_reader` reads these and others' files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from pec_jax.models.layers import expand_runs
from pec_jax.weights.lora_names import A, B
from pec_jax.weights.lora_settings import METADATA_KEY, PEFT_FILE, PREFIX
from pec_jax.weights.tensors import WeightsError, write_tensors

PyTree = Any
STEM = "pytorch_lora_weights"
FILE_NAMES = (f"{STEM}.safetensors", PEFT_FILE)  # diffusers' and PEFT's
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
BELOW = "lora"  # where Flow-GRPO puts PEFT's files into its checkpoint-N
HALVES = {"a": A, "b": B}
LISTED = 5  # names an error message shows


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


def find_lora(path: str | os.PathLike[str]) -> Path:
    """The safetensors file that a path stands for.

    Args:
        path: the file itself, or a directory: `pytorch_lora_weights.safetensors`,
            `adapter_model.safetensors`, or else its only safetensors file is taken, and of a
            directory without any that of `lora/` in it.

    Raises:
        WeightsError: there is none, several, or only a pickle.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = _in_directory(path)
    if path.suffix in PICKLES:
        raise WeightsError(
            f"{path}: a pickle, which can run code when opened, is not read; make "
            f"{path.parent}/model.safetensors of it: python -m pec_jax.convert --file={path} "
            f"--out={path.parent}"
        )
    if not path.is_file():
        raise WeightsError(f"{path}: no such LoRA file or directory")
    return path


def _in_directory(path: Path) -> Path:
    """The file of a directory that is a LoRA, or may be one."""
    names = sorted(p.name for p in path.iterdir() if p.is_file())
    whole = [name for name in names if name.endswith(".safetensors")]
    found = [name for name in FILE_NAMES if name in whole] or whole
    if len(whole) > 1 and found is whole:
        raise WeightsError(f"{path}: holds {', '.join(whole[:LISTED])}; give one of the files")
    if not found and (path / BELOW).is_dir():
        return _in_directory(path / BELOW)
    found = found or [name for name in names if Path(name).suffix in PICKLES]
    if not found:
        below = sorted(p.name for p in path.iterdir() if p.is_dir())
        choice = f"; give one of its directories: {', '.join(below[:LISTED])}" if below else ""
        raise WeightsError(f"{path}: holds no LoRA ({' or '.join(FILE_NAMES)}){choice}")
    return path / found[0]
