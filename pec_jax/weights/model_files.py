"""The weights of an encoder or reward, wherever its publisher has put them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pec_jax.weights import torch_files
from pec_jax.weights.tensors import Tensors, WeightsError, read_file, read_tensors, write_tensors

SAFETENSORS = ".safetensors"
NAMES = ("open_clip_model", "open_clip_pytorch_model")  # open_clip's own, beside transformers'


def open_model(path: Path) -> Tensors:
    """Opens the weights of a model.

    Args:
        path: a file of tensors (.safetensors, or .pt, .pth and .bin of tensors alone), or a
            directory that holds one: `model.safetensors`, whole or in shards, else the only
            safetensors file, else the only other one.

    Returns:
        A lazy mapping from tensor name to array, as stored.

    Raises:
        WeightsError: nothing to read, several files to choose from, or a damaged one.
    """
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file or directory")
    if any(
        (path / f"model{suffix}").is_file() for suffix in (SAFETENSORS, f"{SAFETENSORS}.index.json")
    ):
        return read_tensors(path, "model")
    for suffixes in ((SAFETENSORS,), torch_files.SUFFIXES):
        found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        found = [file for file in found if file.stem in NAMES] or found
        if len(found) == 1:
            return _open_file(found[0])
        if found:
            names = ", ".join(file.name for file in found)
            raise WeightsError(f"{path}: holds {names}; give the path of one of them")
    raise WeightsError(f"{path}: holds no weights; is the download complete?")


def _open_file(path: Path) -> Tensors:
    if path.suffix == SAFETENSORS:
        tensors = read_file(path)
        tensors.directory = path  # which messages name
        return tensors
    if path.suffix in torch_files.SUFFIXES:
        return torch_files.TorchFile(path)
    known = ", ".join((SAFETENSORS, *torch_files.SUFFIXES))
    raise WeightsError(f"{path}: not a file of tensors; known are {known}")


def convert(path: Path, out: Path) -> Path:
    """Writes the tensors of a file as `model.safetensors`, names and dtypes unchanged.

    Args:
        path: a file of tensors.
        out: directory; made if absent.

    Returns:
        The file written. Its header notes the source's name and SHA-256.

    Raises:
        WeightsError: as `open_model`.
        OSError: the directory cannot be written.
    """
    tensors = open_model(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    notes = {"source": path.name, "source_sha256": digest}
    return Path(write_tensors(out, dict(tensors), metadata=notes))
