"""What a person sees on the terminal: our own lines, warnings, and mistakes as one sentence."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging as std_logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

LONGEST = 3000  # characters of a sentence
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def quiet_libraries() -> None:
    """Shows INFO lines of this package only; libraries speak from WARNING on."""
    # Read when tensorflow is imported, which here only writes event files.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if importlib.util.find_spec("libtpu") and not has_tpu():
        # Else libtpu complains on stderr that nothing tells it what it runs on, at any log level.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    logging.set_verbosity(logging.INFO)
    here = str(Path(__file__).parent)

    def ours(record: std_logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, RunError | OSError) or is_disk_full(error):
            return logging.get_verbosity() >= logging.DEBUG  # it comes here, as a sentence
        return record.levelno >= std_logging.WARNING or record.pathname.startswith(here)

    logging.get_absl_handler().addFilter(ours)
    logging.get_absl_handler().python_handler.setFormatter(
        std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    )
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


def _without_closed_loops(hook: Callable[..., object]) -> Callable[..., object]:
    """Of a write that failed, tensorstore says that nobody waits for its other writes any more."""

    def shown(unraisable: Any) -> None:
        error = unraisable.exc_value
        late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not late or logging.get_verbosity() >= logging.DEBUG:
            hook(unraisable)

    return shown


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether this machine may have a TPU, told without loading its library.

    Args:
      root: of the file system.
    """
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        return True
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError):
            kind = vendor.with_name("class").read_text()
            # Google's network cards and disks are in every virtual machine of its cloud.
            if vendor.read_text().strip() == "0x1ae0" and not kind.startswith(("0x01", "0x02")):
                return True
    return False


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


class SaveError(RunError):
    """A checkpoint that could not be written; threads of orbax may wait for it for minutes."""


class FileError(ValueError):
    """A file that cannot be used; the message names it and says what to do."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns the errors a user can mend into `Error: ...` and exit status 2.

    With `--verbosity=1` the stack trace is kept, for those who mend the program instead.
    """
    try:
        yield
    except Exception as error:
        mendable = isinstance(error, ValueError | OSError | RunError)
        mendable = mendable or _is_of_storage(error) or is_disk_full(error)
        if not mendable or logging.get_verbosity() >= logging.DEBUG:
            raise
        status = report(_sentence(error))
        if isinstance(error, SaveError):
            sys.stdout.flush()
            os._exit(status)  # without waiting for those threads
        sys.exit(status)


def report(sentence: str) -> int:
    """Prints `Error: ...`; returns the exit status of a mistake, 2."""
    print(f"Error: {shown(sentence)}", file=sys.stderr)
    return 2


def shown(text: str) -> str:
    """A text that may hold parts of somebody else's file, as a terminal can show it.

    What is no printable character, and would move the cursor or colour what follows, is replaced;
    the middle of a text that is longer than LONGEST is left out.
    """
    clean = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    if len(clean) <= LONGEST:
        return clean
    half = LONGEST // 2
    return f"{clean[:half]} [{len(clean) - 2 * half} characters] {clean[-half:]}"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, says that a disk or a quota has no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(os.strerror(number) in str(error) for number in _FULL):  # of native code
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_of_storage(error: Exception) -> bool:
    """Whether tensorflow raised it, which is here for files on gs:// alone."""
    return any(kind.__module__.startswith("tensorflow.") for kind in type(error).__mro__)


def _sentence(error: Exception) -> str:
    if _is_of_storage(error):
        reason = (str(error) or type(error).__name__).splitlines()[0][:300].rstrip(".")
        return f"the bucket cannot be used: {reason}. Check its name, and `gcloud auth login`."
    if isinstance(error, RunError | FileError):
        return str(error)
    if is_disk_full(error):
        where = getattr(error, "filename", None) or "while writing"
        return f"the disk is full ({where}): free space and run again."
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write or read {error.filename}: {error.strerror}. Choose another directory."
    return str(error)
