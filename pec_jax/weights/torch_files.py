"""Tensors in torch's own zip files (`.pt`, `.pth`, `.bin`), read without torch.

Such a file is a zip archive: a pickle that says which tensors there are, and one raw little-endian
file for each storage. A pickle can name any function to call, so what it may name is an allow-list
of three harmless kinds, none of which is torch's or does more than note something down. A file
that wants anything else is refused before anything is called.

Source: torch's `serialization.py` and `_utils.py` (the format); the Python documentation of
`pickle`, "Restricting Globals".
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pec_jax.weights.tensors import Tensors, WeightsError

SUFFIXES = (".pt", ".pth", ".bin")
MAX_REPEATED = 2**24  # numbers of a view that repeats what its storage holds once
MAX_PICKLE_BYTES = 64 * 2**20
STATE_DICT = "state_dict"  # trainers wrap a model's tensors in an entry of this name
DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A raw file of the archive."""

    key: str
    dtype: np.dtype
    length: int  # numbers


@dataclasses.dataclass(frozen=True)
class _StorageType:
    """Stands for a storage class of torch; it cannot be called."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage, in numbers and not in bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One more than the last number that it reads."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides))


class TorchFile(Tensors):
    """The tensors of one file: name -> array, read from disk when asked for."""

    def __init__(self, path: Path):
        """Reads the list of tensors.

        Raises:
            WeightsError: not such an archive, or one that names anything but tensors.
        """
        self.directory, self._path = path.parent, path
        try:
            with zipfile.ZipFile(path) as archive:
                self._prefix, self._offsets = _stored_files(path, archive)
                content = _read_pickle(archive, f"{self._prefix}data.pkl")
        except WeightsError:
            raise
        # Of what it does not know, or cannot decode, zipfile says so in many ways.
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"{path}: truncated, or not a zip file as torch has written them since 1.6 "
                f"({error}); save it as safetensors"
            ) from error
        found = _unpickle(path, content)
        found = found.get(STATE_DICT, found) if isinstance(found, Mapping) else found
        if not isinstance(found, Mapping):
            raise WeightsError(f"{path}: holds no dictionary of tensors")
        self._tensors = {str(k): v for k, v in found.items() if isinstance(v, _Tensor)}
        for name, tensor in self._tensors.items():
            self._check(name, tensor)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        storage = tensor.storage
        whole = np.memmap(
            self._path, storage.dtype, "r", self._offsets[storage.key][0], (storage.length,)
        )
        size = storage.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            whole[tensor.offset : tensor.stop],
            tensor.shape,
            [size * stride for stride in tensor.strides],
            writeable=False,
        )
        return np.array(view)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._tensors[name].shape

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._path

    def _check(self, name: str, tensor: _Tensor) -> None:
        """Raises WeightsError for a view that leaves its storage, or a storage its file."""
        storage = tensor.storage
        start, size = self._offsets.get(storage.key, (0, -1))
        inside = size == storage.length * storage.dtype.itemsize
        inside = inside and start + size <= self._path.stat().st_size
        positive = min((*tensor.shape, *tensor.strides, tensor.offset), default=0) >= 0
        same = len(tensor.shape) == len(tensor.strides)
        if not (inside and positive and same and tensor.stop <= storage.length):
            raise WeightsError(
                f"{self._path}: tensor {name!r} reaches outside its data; fetch the file again"
            )
        if math.prod(tensor.shape) > max(storage.length, MAX_REPEATED):  # could take any memory
            raise WeightsError(
                f"{self._path}: tensor {name!r} repeats few numbers many times; save its clone()"
            )


def _stored_files(path: Path, archive: zipfile.ZipFile) -> tuple[str, dict[str, tuple[int, int]]]:
    """The archive's root, "NAME/", and key of a storage -> (start, bytes) within the file.

    Raises:
        WeightsError: a compressed entry, which torch never writes, or another byte order.
    """
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{path}: a zip file, but not one of torch's")
    prefix = pickles[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and _read_pickle(archive, order) != b"little":
        raise WeightsError(f"{path}: written on a big-endian machine; save it as safetensors")
    files = {}
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(f"{path}: has compressed entries, which torch does not write")
        if info.filename.startswith(f"{prefix}data/"):
            start = _start(archive, info)
            files[info.filename.removeprefix(f"{prefix}data/")] = (start, info.file_size)
    return prefix, files


def _start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header of 30 bytes, its name, and extras."""
    file: Any = archive.fp
    file.seek(info.header_offset + 26)
    lengths = file.read(4)
    if len(lengths) < 4:
        raise zipfile.BadZipFile("an entry lies outside the file")
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return info.header_offset + 30 + name + extra


def _read_pickle(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > MAX_PICKLE_BYTES:
        raise zipfile.BadZipFile(f"{name} has {info.file_size} bytes")
    return archive.read(info)


class _Unpickler(pickle.Unpickler):
    """Knows three kinds of names, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _note_tensor
        if module == "torch" and name in DTYPES:
            return _StorageType(np.dtype(DTYPES[name]))
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, length = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        return _Storage(str(key), storage_type.dtype, int(length))


def _check_numbers(content: bytes) -> None:
    """Refuses a pickle that numbers what it remembers beyond its own length.

    The unpickler would fill memory up to that number, which may be 2^32.
    """
    for operation, argument, _ in pickletools.genops(content):
        if operation.name.endswith("PUT") and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it has a memo of number {argument}")


def _note_tensor(
    storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *rest: Any
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("it has a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _unpickle(path: Path, content: bytes) -> Any:
    import io

    try:
        _check_numbers(content)
        return _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # a hostile pickle can raise anything
        raise WeightsError(
            f"{path}: a pickle of more than tensors is not read ({error}); "
            "save the model as safetensors"
        ) from error
