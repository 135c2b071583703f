"""What a reader may do: end soon, with a result or a sentence, and touch no file but its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pec_jax.errors import RunError, _sentence, shown

SECONDS = 10  # of a reader; each takes some milliseconds on what is right
MEMORY = 512 * 2**20  # more bytes than before; what is read is smaller than 1 MB
LONGEST = 4000  # characters of a sentence
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
_NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
          "socket.connect", "socket.getaddrinfo", "pickle.find_class", "webbrowser.open",
          "shutil.rmtree")  # fmt: skip
_LIBRARIES = [Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_path("stdlib")),
              Path(__file__).parents[2] / "pec_jax", Path("/usr"), Path("/proc"), Path("/sys"),
              Path("/dev"), Path("/etc/ld.so.cache")]  # fmt: skip


class _Audit:
    """Python tells of what is opened and started, also by libraries. It cannot be unhooked."""

    def __init__(self) -> None:
        self.place: Path | None = None
        self.forbidden: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.place is None:
            return
        if event in _NEVER:
            self.forbidden.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = Path(os.path.realpath(os.fsdecode(arguments[0])))
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ours = path.is_relative_to(self.place)
            cache = path.is_relative_to(os.path.realpath(os.environ["PEC_JAX_CACHE"]))
            known = ours or any(path.is_relative_to(library) for library in _LIBRARIES)
            # What the machinery around a reader looks at: entry points, source lines.
            known = known or path.parent.suffix == ".egg-info" or path.suffix == ".py"
            if not cache and (not known or (writes and path.parts[1] not in ("dev", "proc"))):
                self.forbidden.append(f"open {path} {'to write' if writes else 'to read'}")


_AUDIT: list[_Audit] = []


class NotAllowedError(Exception):
    """A reader did what it may not."""


@contextlib.contextmanager
def watched(place: Path) -> Iterator[None]:
    """Runs a reader of files in `place`.

    Raises:
      NotAllowedError: it took too long or too much memory, opened a file elsewhere, started
        something, or raised what is no sentence for a person about a file of `place`.
    """
    if not _AUDIT:
        _AUDIT.append(_Audit())
    audit = _AUDIT[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    previous = signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(SECONDS)
    audit.forbidden, audit.place = [], Path(os.path.realpath(place))
    try:
        yield
    except (ValueError, OSError, RunError) as error:
        _check_sentence(shown(_sentence(error)), place, error)
    finally:
        audit.place = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if audit.forbidden:
        raise NotAllowedError("; ".join(audit.forbidden))
    if (grown := _peak() - before) > MEMORY:
        raise NotAllowedError(f"{grown / 2**20:.0f} MB of memory")


def _peak() -> int:
    """The most memory of this process since the peak was reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def _too_late(number: int, frame: object) -> None:
    raise NotAllowedError(f"more than {SECONDS} s")


def _check_sentence(sentence: str, place: Path, error: Exception) -> None:
    if not sentence or len(sentence) > LONGEST or _CONTROL.search(sentence):
        raise NotAllowedError(f"no sentence for a person: {sentence!r:.500}") from error
    if place.name not in sentence:
        raise NotAllowedError(f"a sentence that names no file: {sentence!r:.500}") from error
