"""Writing small random pipelines, so that everything can be tried before real weights are there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.networks import load_module, save_network
from pec_jax.families.registry import named_family, transformer_network
from pec_jax.io import write_json


def write_pipeline(
    out: str | Path, family: str, transformer: Mapping[str, Any] | None = None, *, seed: int = 0
) -> Path:
    """Writes a small random pipeline of a family.

    Its tokenizers, text encoders, autoencoder and the encoders of rewards and perception are those
    of the embedded default, changed as the family wants them.

    Args:
        out: directory to write; it must not exist.
        family: its short name, such as "flux".
        transformer: entries of the transformer's config that differ from the family's `tiny`.
        seed: of the random weights.

    Returns:
        The directory.

    Raises:
        FileExistsError: `out` exists.
        WeightsError, ValueError: an unknown family, or a config that cannot be computed.
    """
    kind, out = named_family(family), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose a directory that does not.")
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        skip = shutil.ignore_patterns("transformer", "prompts", "README.md")
        shutil.copytree(SHAPES_DIRECTORY, temporary, ignore=skip)
        kind.make_tiny_parts(temporary)
        config = {"_class_name": kind.transformer_network.class_name, **kind.tiny}
        write_transformer(temporary / "transformer", config | dict(transformer or {}), seed)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def write_transformer(
    directory: Path, config: dict[str, Any], seed: int = 0, dtype: Any = "float32"
) -> None:
    """Writes a transformer with random weights: config.json and its safetensors file.

    Args:
        directory: created if absent.
        config: the whole config.json.
        seed: of the weights, which keep the scale of activations.
        dtype: in which they are stored.

    Raises:
        WeightsError: a config that cannot be computed.
    """
    write_json(directory / "config.json", config)
    network = transformer_network(directory)
    module = load_module(network, directory)
    shapes = network.shapes(module)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        kind = path[-1].key
        if kind == "kernel":
            noise /= np.sqrt(leaf.shape[-2])
        else:
            noise = 1.0 + 0.1 * noise if kind == "scale" else 0.1 * noise
        return noise.astype(dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes["params"])
    save_network(directory, config, {"params": params, "buffers": network.buffers(module)})
