"""Named tensors in safetensors files, whole or sharded; nothing that could run code is read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors looks up)
import numpy as np
import safetensors
from safetensors.numpy import save_file

STEMS = ("model", "diffusion_pytorch_model")
MAX_JSON_BYTES = 64 * 2**20  # an index of a million tensors is smaller


class WeightsError(ValueError):
    """A model directory that cannot be used; the message names the file and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        WeightsError: missing, unreadable, too large, not UTF-8 JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise WeightsError(f"{path}: larger than {MAX_JSON_BYTES} bytes, which no config is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; is the download complete?") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of one model: name -> array, read from disk when asked for."""

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
        try:
            # Opened anew each time: a mapping that stays open keeps all pages ever read in memory.
            with _open(path) as handle:
                return handle.get_tensor(name)
        except (safetensors.SafetensorError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path}: tensor {name!r} cannot be read: {error}") from error

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


def _read_index(index: Path) -> dict[str, Path]:
    entries = read_json(index).get("weight_map")
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


def read_metadata(path: Path) -> dict[str, str]:
    """The notes in the header of a safetensors file, empty if there are none.

    Raises:
        WeightsError: missing, truncated or of another format.
    """
    return _open(path).metadata() or {}


def write_tensors(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> Path:
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
    path = Path(directory) / f"{stem}.safetensors"

    def write(temporary: Path) -> None:
        # transformers and diffusers refuse a file that does not say its tensors are torch's.
        save_file(arrays, temporary, metadata={"format": "pt", **(metadata or {})})

    replace_file(path, write)
    return path


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Any) -> None:
    """Calls `write` on a temporary file in the same directory, syncs it and renames it to `path`.

    Args:
        path: the file to create or replace; its directory is created if absent.
        write: called with the temporary file's path.

    Raises:
        OSError: as `write`; the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        # mkstemp makes a private file; a model directory is to be shared.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
