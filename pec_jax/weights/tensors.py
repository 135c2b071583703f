"""Named tensors in safetensors files, whole or sharded; nothing that could run code is read."""

from __future__ import annotations

import abc
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # also registers bfloat16 with numpy, which safetensors looks up
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from pec_jax import io
from pec_jax.errors import FileError

MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
STEMS = ("model", "diffusion_pytorch_model")
# What the safetensors library asks numpy for, which has none of them.
FLOAT8 = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


class WeightsError(FileError):
    """A model directory that cannot be used; the message names the file and what to do."""


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one model: name -> array, read when asked for.

    Attributes:
        directory: where the model lies; named in messages.
    """

    directory: Path

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    @abc.abstractmethod
    def file(self, name: str) -> Path:
        """The file that holds a tensor."""


class TensorFiles(Tensors):
    """Those of safetensors files."""

    def __init__(self, directory: Path, files: Mapping[str, Path]):
        """Opens every file, which checks its header against its size.

        Args:
            directory: where the model lies; named in messages.
            files: tensor name -> the file that holds it.

        Raises:
            WeightsError: a file is missing, truncated or lacks a tensor it should hold.
        """
        self.directory = directory
        self._files = dict(files)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._files.values())):
            with _open(path) as handle:
                held = {name for name in handle.keys() if self._files.get(name) == path}  # noqa: SIM118
                self._shapes |= {n: tuple(handle.get_slice(n).get_shape()) for n in held}
        for name, path in self._files.items():
            if name not in self._shapes:
                raise WeightsError(f"{path}: the index says it holds {name!r}, but it does not")

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._files[name]
        # Opened anew each time: a mapping that stays open keeps all pages ever read in memory.
        with _open(path) as handle:
            kind = handle.get_slice(name).get_dtype()
            if kind in FLOAT8:
                return _read_float8(path, name, FLOAT8[kind])
            try:
                return handle.get_tensor(name)
            except (safetensors.SafetensorError, TypeError, AttributeError) as error:
                raise WeightsError(
                    f"{path}: tensor {name!r} cannot be read, its type is {kind}; save it as "
                    "float32, bfloat16, float16 or float8"
                ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._shapes[name]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]


def _open(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError(f"{path}: missing shard; fetch the model again")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: truncated or not a safetensors file ({error}); fetch it again"
        ) from error


def _read_float8(path: Path, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor of a type that the library cannot give; `_open` has checked the file's header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        start, stop = entry["data_offsets"]
        file.seek(8 + size + start)
        return np.frombuffer(file.read(stop - start), dtype).reshape(entry["shape"])


def _read_index(index: Path) -> dict[str, Path]:
    entries = io.read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise WeightsError(f"{index}: has no weight_map; fetch the file again")
    files = {}
    for name, shard in entries.items():
        # A shard stands beside its index: nothing else on the disk may be opened.
        if not isinstance(shard, str) or shard != Path(shard).name or shard in ("", ".", ".."):
            raise WeightsError(f"{index}: {name!r} points to {shard!r}, which is not a file name")
        files[name] = index.parent / shard
    return files


def read_tensors(
    directory: str | os.PathLike[str], stem: str | None = None, variant: str = ""
) -> TensorFiles:
    """Opens a model's weights.

    Args:
        directory: holds `STEM.safetensors`, or `STEM.safetensors.index.json` and its shards.
        stem: "model" (transformers) or "diffusion_pytorch_model" (diffusers); by default
            whichever is there.
        variant: such as "fp16": `STEM.fp16.safetensors` is preferred to the plain file.

    Returns:
        A lazy mapping from tensor name to array, in the stored dtype.

    Raises:
        WeightsError: nothing to read, a pickle only, a missing shard, a truncated file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such directory")
    stems = STEMS if stem is None else (stem,)
    names = [
        (f"{s}{v}.safetensors", f"{s}.safetensors.index{v}.json")
        for v in ([f".{variant}"] if variant else []) + [""]
        for s in stems
    ]
    for whole, index in ((directory / a, directory / b) for a, b in names):
        if whole.is_file():
            with _open(whole) as handle:
                return TensorFiles(directory, dict.fromkeys(handle.keys(), whole))
        if index.is_file():
            return TensorFiles(directory, _read_index(index))
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".ckpt"))
    expected = " or ".join(f"{s}.safetensors" for s in stems)
    if pickles:
        raise WeightsError(
            f"{directory / pickles[0]}: a pickle, which can run code when opened, is not read; "
            f"save the model as {expected} (save_pretrained(..., safe_serialization=True))"
        )
    raise WeightsError(f"{directory}: holds no {expected}; is the download complete?")


def read_file(path: Path) -> TensorFiles:
    """Opens one safetensors file, whatever its name.

    Raises:
        WeightsError: missing, truncated or of another format.
    """
    return TensorFiles(path.parent, dict.fromkeys(_open(path).keys(), path))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The notes in the header of a safetensors file, local or remote; empty if there are none.

    Source: https://huggingface.co/docs/safetensors, "Format": 8 bytes with the size of the header,
    then the header, JSON whose "__metadata__" holds the notes.

    Raises:
        WeightsError: missing, truncated or of another format.
    """
    try:
        with epath.Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            notes = json.loads(file.read(size)).get("__metadata__", {})
        return {str(key): str(value) for key, value in notes.items()}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise WeightsError(
            f"{os.fspath(path)}: truncated or not a safetensors file; fetch it again"
        ) from error


def write_tensors(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> epath.Path:
    """Writes `STEM.safetensors`; the name appears only once all of it is on the disk.

    Args:
        directory: created if absent.
        tensors: name -> array.
        stem: "model" (transformers) or "diffusion_pytorch_model" (diffusers).
        metadata: notes for the file's header, beside that of its format.

    Returns:
        The file written.

    Raises:
        OSError: the directory cannot be written or the disk is full; nothing is left behind.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    path = epath.Path(directory) / f"{stem}.safetensors"

    def write(temporary: Path) -> None:
        # transformers and diffusers refuse a file that does not say its tensors are torch's.
        save_file(arrays, temporary, metadata={"format": "pt", **(metadata or {})})

    io.replace_file(path, write)
    return path
