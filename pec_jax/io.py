"""Files on this machine and on gs://: one path type, one atomic writer, one JSON reader.

Paths are `etils.epath.Path`. An object store differs from a disk in three ways that matter here:
an object appears whole when its upload ends, so that no temporary name is needed; nothing can be
appended to it; and libraries that map files into memory cannot open it, so that they get a copy
in the user's cache.
"""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from pec_jax.errors import FileError

CACHE_VARIABLE = "PEC_JAX_CACHE"
MAX_JSON_BYTES = 64 * 2**20  # an index of a million tensors is smaller
REWRITE_SECONDS = 60.0  # how often a file of lines on an object store is brought up to date
TOLD_BYTES = 64  # so many of a text's first bytes tell its encoding
_MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def path(name: str | os.PathLike[str]) -> epath.Path:
    """The path of a name as a person types it: `~` is the home directory, gs:// a bucket.

    Raises:
      FileError: an address of another kind, which would otherwise become a local file's name.
    """
    text = os.fspath(name)
    match = _SCHEME.match(text)
    if match and match[1] != "gs":
        raise FileError(
            f"{text}: addresses of the kind {match[0]} are not supported; give a local path or "
            "gs://BUCKET/PATH."
        )
    if match and not text.removeprefix("gs://").strip("/"):
        raise FileError(f"{text}: names no bucket; give gs://BUCKET/PATH.")
    return epath.Path(text).expanduser()


def is_remote(file: epath.Path) -> bool:
    """Whether a path lies in an object store."""
    return os.fspath(file).startswith("gs://")


def cache_directory() -> pathlib.Path:
    """Where prepared prompt sets and fetched files are kept: $PEC_JAX_CACHE, or the user's."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(
        os.environ.get(CACHE_VARIABLE) or os.path.join(base, "pec_jax")
    ).expanduser()


def read_json(file: os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      FileError: missing, unreadable, too large, not UTF-8 JSON, or not an object.
    """
    source = epath.Path(file)
    try:
        with source.open("rb") as handle:
            data = handle.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise FileError(f"{source}: no such file; is the download complete?") from None
    except OSError as error:
        raise FileError(f"{source}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise FileError(f"{source}: larger than {MAX_JSON_BYTES} bytes, which no config is")
    try:
        value = json.loads(data.decode("utf-8"), parse_int=_integer)
    except (ValueError, RecursionError) as error:  # also a number of more than 4300 digits
        raise FileError(f"{source}: not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise FileError(f"{source}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _integer(digits: str) -> int:
    """An integer that a float can hold, too; nothing that is read is larger."""
    value = int(digits)
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"an integer of {len(digits)} digits") from None
    return value


def other_encoding(head: bytes) -> str | None:
    """The name of a text's encoding, where its first bytes tell that it is not UTF-8.

    Args:
      head: the first TOLD_BYTES of a file, or all of a shorter one.

    Returns:
      As `iconv` knows it; None for UTF-8 and for what cannot be told.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    # Latin letters have a zero byte beside each, which no text in UTF-8 has.
    for place, name in ((0, "UTF-16BE"), (1, "UTF-16LE")):
        if len(head) > 1 and any(head) and not any(head[place::2]):
            return name
    return None


def recode_advice(file: os.PathLike[str], encoding: str | None = None) -> str:
    """How to bring a text file to UTF-8, from an encoding that is known or guessed."""
    source = pathlib.PurePath(file)
    old, new = (shlex.quote(n) for n in (source.name, f"{source.stem}_utf8{source.suffix}"))
    if encoding is None:
        return (
            "Save it as UTF-8, or convert it from the encoding that it has; that of Windows: "
            f"iconv -f CP1252 -t UTF-8 {old} > {new}"
        )
    return f"Convert it: iconv -f {encoding} -t UTF-8 {old} > {new}"


def write_json(file: os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: os.PathLike[str], text: str) -> None:
    """Writes a text as UTF-8, whole or not at all."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: os.PathLike[str], data: bytes) -> None:
    """Writes a file, whole or not at all."""
    replace_file(file, lambda temporary: temporary.write_bytes(data))


def replace_file(file: os.PathLike[str], write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write` on a temporary local file and puts the result in the place of `file`.

    After a crash, the old file or the new one is there, never a part: on a disk the temporary file
    lies in the same directory, is synced and renamed; to an object store it is uploaded.

    Args:
      file: what to create or replace; its directory is created if absent.
      write: called with the temporary file's path.

    Raises:
      OSError: as `write`; the temporary file is removed.
    """
    target = epath.Path(file)
    if is_remote(target):
        with _temporary_file(pathlib.Path(tempfile.gettempdir()), target.name) as temporary:
            write(temporary)
            epath.Path(temporary).copy(target, overwrite=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(pathlib.Path(target.parent), target.name) as temporary:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        # mkstemp makes a private file; what is written here is to be shared.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)


@contextlib.contextmanager
def _temporary_file(directory: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    descriptor, created = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
    os.close(descriptor)
    temporary = pathlib.Path(created)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def local_copy(source: os.PathLike[str], patterns: Sequence[str] = ("*",)) -> pathlib.Path:
    """A file or directory as programs that need local files can open it.

    Args:
      source: what is on this machine already is returned as it is; of gs:// a copy is made in the
        cache, under a name that depends on the address and on every file's size and time, so that
        an object that changed is fetched anew.
      patterns: of a remote directory, the files that are wanted, as `fnmatch` compares them with
        their paths below it.

    Returns:
      The local path.

    Raises:
      FileNotFoundError: there is no such remote file.
      OSError: the cache cannot be written.
    """
    remote = epath.Path(source)
    if not is_remote(remote):
        return pathlib.Path(remote)
    files = _remote_files(remote, patterns)
    listing = sorted((name, stat.length, stat.mtime) for name, stat in files.items())
    key = hashlib.sha256(repr((os.fspath(remote), listing)).encode()).hexdigest()[:32]
    target = cache_directory() / "gs" / key / remote.name
    if target.exists():
        return target
    size = sum(length for _, length, _ in listing)
    logging.info("Fetching %s (%.1f MB) into %s ...", remote, size / 1e6, target)
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent.parent, prefix=".fetch.") as scratch:
        copy = pathlib.Path(scratch, key)
        for name, _, _ in listing:
            file = copy / remote.name / name
            file.parent.mkdir(parents=True, exist_ok=True)
            (remote / name).copy(epath.Path(file), overwrite=True)
        with contextlib.suppress(OSError):  # another process was the first to fetch it
            copy.rename(target.parent)
    if not target.exists():
        raise OSError(f"{remote}: could not be copied to {target}")
    return target


def _remote_files(remote: epath.Path, patterns: Sequence[str]) -> dict[str, Any]:
    """Path below `remote` -> its size and time; of a single file, "" -> its own."""
    if not remote.is_dir():
        return {"": remote.stat()}
    found = {}
    for root, _, names in remote.walk():
        below = epath.Path(root).relative_to(remote)
        for name in names:
            file = os.fspath(below / name)
            if any(fnmatch.fnmatch(file, pattern) for pattern in patterns):
                found[file] = (remote / file).stat()
    if not found:
        raise FileNotFoundError(f"{remote}: holds none of {', '.join(patterns)}")
    return found


class LineFile:
    """A text file to which lines are added, one writer at a time.

    On a disk each line is there when `add` returns. An object cannot be appended to: its lines are
    kept in memory, and it is rewritten at `flush`, and by `add` when REWRITE_SECONDS have passed.
    """

    def __init__(self, file: epath.Path, keep: Callable[[str], bool]):
        """Opens the file; lines for which `keep` is false are removed from it."""
        self._file = file
        text = file.read_bytes().decode("utf-8", errors="replace") if file.exists() else ""
        self._lines = [line + "\n" for line in text.splitlines() if keep(line)]
        self._written = time.monotonic()
        self._handle = None
        if "".join(self._lines) != text:
            write_text(file, "".join(self._lines))
        self._changed = False
        if not is_remote(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._handle = pathlib.Path(file).open("a", encoding="utf-8")  # noqa: SIM115
            self._lines = []

    def add(self, line: str) -> None:
        """Adds a line; `line` has no line break."""
        if self._handle is not None:
            self._handle.write(line + "\n")
            self._handle.flush()
            return
        self._lines.append(line + "\n")
        self._changed = True
        if time.monotonic() - self._written >= REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns once all lines are safe from a crash of the machine."""
        if self._handle is not None:
            os.fsync(self._handle.fileno())
        elif self._changed:
            write_text(self._file, "".join(self._lines))
            self._written, self._changed = time.monotonic(), False

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        if self._handle is not None:
            self._handle.close()
