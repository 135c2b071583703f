"""One holder a run directory: two processes that write to one directory destroy its run.

The holder is written down in `.holder.json`: who, since when, and a sign of life every
HEARTBEAT_SECONDS. On a disk the file is also locked with flock, which the kernel releases when the
process dies, however it dies; so a dead holder of this machine is replaced at once. A holder on
another machine, whose lock may not be visible here (NFS, a mounted bucket, gs://), is watched: if
it gives no sign of life for TIMEOUT_SECONDS it is taken for dead.

An object store has no locks. There, whoever finds no live holder writes itself down, waits
SETTLE_SECONDS and reads the file again: of several that did so at once, only the last one still
finds its own name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from pec_jax import io
from pec_jax.errors import RunError

FILE = ".holder.json"
HEARTBEAT_SECONDS = 15.0
TIMEOUT_SECONDS = 180.0  # of a dead process on another machine; twelve heartbeats
SETTLE_SECONDS = 2.0  # longer than an object store takes from a read to the next write
_POLL_SECONDS = 1.0


class Hold:
    """The right to write to a directory, from `take` to `release`."""

    def __init__(self, directory: epath.Path):
        self._directory = directory
        self._file: _LeaseFile = (
            _LeaseFile(directory / FILE)
            if io.is_remote(directory)
            else _LockedFile(directory / FILE)
        )
        self._me = {"token": uuid.uuid4().hex, "since": _now(), **_process()}
        self._found: bytes | None = None  # what was in the file before
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._gone = self._lost = False

    def take(self) -> None:
        """Becomes the holder.

        Raises:
          RunError: another process holds the directory; the message says which.
          OSError: the directory cannot be written.
        """
        while True:
            if not self._file.lock():
                raise _held(self._directory, _parse(self._file.read()))
            try:
                self._found = self._file.read()
                if self._wait_for_the_dead(_parse(self._found)):
                    self._write_down()
                    break
                self._file.unlock()  # its holder has ended and deleted the file: a new one
            except BaseException:
                self._file.unlock()
                raise
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def release(self, *, restore: bool) -> None:
        """Ends the hold.

        Args:
          restore: leave the file as `take` found it, for the sake of who wants nothing changed.
        """
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(Exception):  # a network that is away for a moment
            self._look()
        if self._gone or self._lost:
            self._file.unlock()
        elif restore and self._found:
            self._file.write(self._found)
            self._file.unlock()
        else:
            self._file.remove()

    def check(self) -> None:
        """Raises RunError if the directory is gone, or another process has taken it."""
        with contextlib.suppress(Exception):  # a network that is away for a moment
            self._look()
        if self._gone and not self._lost:
            raise RunError(
                f"{self._directory / FILE} is gone: the directory was moved or deleted while this "
                "run wrote to it. Nothing more is written. Put it back, and the same command goes "
                "on after its last checkpoint."
            )
        if self._lost:
            raise RunError(
                f"another process has taken {self._directory}, since this one gave no sign of life "
                f"for {TIMEOUT_SECONDS:.0f} s. Nothing more is written; the other one goes on."
            )

    def _look(self) -> None:
        """Finds out whether the file is there, and whether it names another process."""
        data = self._file.read()
        self._gone = data is None
        self._lost |= _parse(data).get("token", self._me["token"]) != self._me["token"]

    def _wait_for_the_dead(self, holder: dict[str, Any]) -> bool:
        """Returns once a holder that was written down is dead (True) or has ended (False)."""
        if not holder or _is_dead(holder, locked=self._file.exclusive):
            return True
        if holder.get("host") == self._me["host"]:
            raise _held(self._directory, holder)
        logging.info(
            "%s is held by %s; waiting up to %.0f s for its sign of life ...",
            self._directory,
            _describe(holder),
            TIMEOUT_SECONDS,
        )
        end = time.monotonic() + TIMEOUT_SECONDS - (time.time() - holder["beat"])
        while time.monotonic() < end:
            time.sleep(min(_POLL_SECONDS, HEARTBEAT_SECONDS))
            data = self._file.read()
            if data is None:
                return False
            now = _parse(data)
            if now and (now["token"], now["beat"]) != (holder["token"], holder["beat"]):
                raise _held(self._directory, now)
        return True

    def _write_down(self) -> None:
        self._beat()
        if self._file.exclusive:
            return
        time.sleep(SETTLE_SECONDS)
        now = _parse(self._file.read())
        if now.get("token") != self._me["token"]:
            raise _held(self._directory, now)

    def _beat(self) -> None:
        text = json.dumps(self._me | {"beat": time.time()}, indent=2) + "\n"
        self._file.write(text.encode())

    def _keep_beating(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._look()
                if self._gone or self._lost:
                    return
                self._beat()
            except Exception as error:  # a network that is away for a moment
                logging.warning("%s: no sign of life was written: %s", self._directory, error)


class _LeaseFile:
    """The file that names the holder."""

    exclusive = False  # whether `lock` keeps others out by itself

    def __init__(self, path: epath.Path):
        self._path = path

    def lock(self) -> bool:
        """Whether nobody else is locking the file."""
        return True

    def unlock(self) -> None:
        """Lets others lock the file."""

    def read(self) -> bytes | None:
        """The content, None if there is none."""
        try:
            return self._path.read_bytes() or None
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Replaces the content."""
        io.write_bytes(self._path, data)

    def remove(self) -> None:
        """Deletes the file, then lets others lock it."""
        self._path.unlink(missing_ok=True)
        self.unlock()


class _LockedFile(_LeaseFile):
    """On a disk; written in place, since a lock belongs to the file and not to its name."""

    def __init__(self, path: epath.Path):
        super().__init__(path)
        self._descriptor: int | None = None
        self._created = False

    def lock(self) -> bool:
        while True:
            self._created = not self._path.exists()
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.exclusive = True
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError:
                self.exclusive = False  # a file system without locks: as on an object store
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                    self._descriptor = descriptor
                    return True
            os.close(descriptor)  # its last holder has just deleted it: take the new one

    def unlock(self) -> None:
        if self._descriptor is None:
            return
        if self._created and not os.fstat(self._descriptor).st_size:
            pathlib.Path(self._path).unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def write(self, data: bytes) -> None:
        assert self._descriptor is not None
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))
        os.fsync(self._descriptor)  # to the others, where the disk is a network's


def _process() -> dict[str, Any]:
    """This process, such that another one can tell whether it is still alive."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def _start_of(pid: int) -> str:
    """When a process of this machine started, in the kernel's words; "" if there is none."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The second field is the command in brackets, which may itself hold spaces and brackets.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{boot}/{fields[19]}"
    except OSError:
        return ""


def _is_dead(holder: dict[str, Any], *, locked: bool) -> bool:
    """Whether a holder is known to be dead: of this machine and gone, or silent for too long."""
    if holder["host"] == socket.gethostname():
        # With the lock in our hands nobody of this machine can have it.
        return locked or not _is_alive(holder["pid"], holder["start"])
    return time.time() - holder["beat"] > TIMEOUT_SECONDS


def _is_alive(pid: int, start: str) -> bool:
    """Whether a process of this machine runs, and is not a later one that got its number."""
    if start:
        return _start_of(pid) == start
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _parse(data: bytes | None) -> dict[str, Any]:
    """What a file says; nothing if a crash left it half-written."""
    try:
        value = json.loads(data or b"{}")
        texts = {name: str(value[name]) for name in ("token", "host", "since", "start")}
        return {**texts, "pid": int(value["pid"]), "beat": float(value["beat"])}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def _held(directory: epath.Path, holder: dict[str, Any]) -> RunError:
    return RunError(
        f"{directory} is in use by {_describe(holder)}. Wait for it or stop it, or choose another "
        f"--workdir. If you are sure that it is dead, delete {directory / FILE}."
    )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


@contextlib.contextmanager
def new_directory(directory: epath.Path) -> Iterator[None]:
    """Makes a directory, and removes it and what parents it made if it is empty in the end."""
    made: list[pathlib.Path] = []
    if not io.is_remote(directory):
        local = pathlib.Path(directory)
        made = [p for p in (local, *local.parents) if not p.exists()]
        local.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # no longer empty: somebody wanted it
                path.rmdir()
