"""Prompt embeddings on disk: made once by `pec_jax.embed`, read row by row while training.

A directory holds `index.json` (prompts, sizes, the fingerprint of the text encoders) and parts
`embeddings-00000.safetensors`, ... of PART prompts each. A part appears whole or not at all, so
that an interrupted run goes on where it stopped. T5-XXL then need not live beside the policy, and
a set of prompts may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from etils import epath

from pec_jax import io
from pec_jax.io import read_json, write_json
from pec_jax.types import Conditioning
from pec_jax.weights.tensors import WeightsError, write_tensors

PART = 64  # prompts per file
FIELDS = tuple(field.name for field in dataclasses.fields(Conditioning))
INDEX = "index.json"
_BLOCK = 1 << 22
# What a store's directory holds, with the temporary files of an interrupted run.
_OURS = re.compile(r"(index\.json|embeddings-\d{5,}\.safetensors)|\.(index|embeddings-\d{5,})\..*")


def fingerprint(root: Path, parts: Iterable[str], settings: dict[str, Any]) -> str:
    """SHA-256 over all files of the text encoders and tokenizers, and how they are used.

    Args:
        root: the pipeline's directory.
        parts: component directories, such as "text_encoder" and "tokenizer".
        settings: what else changes an embedding: lengths and precision.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for part in sorted(parts):
        for path in sorted(p for p in (root / part).rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(root)).encode() + b"\0")
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
    return digest.hexdigest()


class EmbeddingStore:
    """Embeddings of known prompts, read when asked for."""

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a finished store.

        Raises:
            WeightsError: there is none, it is unfinished, or it is damaged.
        """
        self.directory = io.path(directory)
        self._local: dict[int, Path] = {}  # part -> its file on this machine
        index = read_json(self.directory / INDEX)
        prompts = index.get("prompts")
        listed = isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
        if not listed or not prompts:
            raise WeightsError(f"{self.directory / INDEX}: has no list of prompts; embed anew")
        self.fingerprint = str(index.get("fingerprint"))
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        present = {path.name for path in self.directory.iterdir()}
        for number in range(-(-len(prompts) // PART)):
            if (path := _part(self.directory, number)).name not in present:
                raise WeightsError(
                    f"{path}: missing; run pec_jax.embed again with the same flags to finish it"
                )

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, prompts: Sequence[str]) -> np.ndarray:
        """The rows [N] of prompts.

        Raises:
            WeightsError: a prompt that was not embedded.
        """
        missing = [prompt for prompt in prompts if prompt not in self._rows]
        if missing:
            raise WeightsError(
                f"{self.directory}: {len(missing)} prompts are not embedded there, such as "
                f"{missing[0]!r}; run pec_jax.embed with all prompt files of the config"
            )
        return np.array([self._rows[prompt] for prompt in prompts], np.int64)

    def gather(self, rows: np.ndarray) -> Conditioning:
        """The embeddings of some rows [N], NumPy arrays, fp32 but for a mask."""
        read = [self._read(int(row)) for row in rows]
        fields: dict[str, Any] = {name: np.stack([r[name] for r in read]) for name in read[0]}
        return Conditioning(**fields)

    def _read(self, row: int) -> dict[str, np.ndarray]:
        """The fields of one prompt's conditioning that its file has."""
        number = row // PART
        path = _part(self.directory, number)
        try:
            if number not in self._local:
                self._local[number] = io.local_copy(path)
            with safetensors.safe_open(self._local[number], framework="numpy") as part:
                held = {"tokens", *part.keys()}  # all have tokens: their absence is damage
                fields = {n: part.get_slice(n)[row % PART] for n in FIELDS if n in held}
        except (safetensors.SafetensorError, OSError, IndexError) as error:
            raise WeightsError(f"{path}: damaged ({error}); delete it and embed again") from error
        return {n: a if a.dtype == bool else a.astype(np.float32) for n, a in fields.items()}


def refuse_other_files(directory: epath.Path) -> None:
    """Raises WeightsError if a directory holds anything but a store, finished or not."""
    if directory.exists() and not directory.is_dir():
        raise WeightsError(f"{directory}: is a file; --out must be a directory")
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    if others := sorted(name for name in names if not _OURS.fullmatch(name)):
        raise WeightsError(
            f"{directory}: holds other files, such as {others[0]}, and embeddings are not written "
            "among them; choose a new or empty directory as --out"
        )


def write_store(
    directory: str | os.PathLike[str],
    prompts: Sequence[str],
    mark: str,
    encode: Callable[[Sequence[str]], Conditioning],
    *,
    dtype: Any = np.float32,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> int:
    """Embeds prompts, part by part; parts that are there already are skipped.

    Args:
        directory: created if absent.
        prompts: N prompts; repeated ones are stored once.
        mark: the encoders' `fingerprint`.
        encode: prompts -> Conditioning.
        dtype: in which embeddings are stored; a mask stays bool.
        progress: wraps the numbers of the parts that are still to be made.

    Returns:
        How many parts were made now.

    Raises:
        WeightsError: the directory holds other prompts or other files, or was made by other
            encoders.
    """
    root, prompts = io.path(directory), list(dict.fromkeys(prompts))
    refuse_other_files(root)
    index = {"fingerprint": mark, "prompts": prompts}
    path = root / INDEX
    if path.exists() and read_json(path) != index:
        raise WeightsError(
            f"{root}: holds embeddings of other prompts or of other text encoders; "
            "choose another --out"
        )
    write_json(path, index)
    numbers = range(-(-len(prompts) // PART))
    missing = [number for number in numbers if not _part(root, number).is_file()]
    for number in progress(missing):
        part = encode(prompts[number * PART : (number + 1) * PART])
        found = {name: getattr(part, name) for name in FIELDS if getattr(part, name) is not None}
        arrays = {
            name: np.asarray(array).astype(bool if array.dtype == bool else dtype)
            for name, array in found.items()
        }
        write_tensors(root, arrays, _part(root, number).stem)
    return len(missing)


def _part(directory: epath.Path, number: int) -> epath.Path:
    return directory / f"embeddings-{number:05d}.safetensors"
