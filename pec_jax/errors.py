"""What a person sees on the terminal: our own lines, warnings, and mistakes as one sentence."""

from __future__ import annotations

import contextlib
import errno
import logging as std_logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import logging


def quiet_libraries() -> None:
    """Shows INFO lines of this package only; libraries speak from WARNING on."""
    # Read when tensorflow is imported, which here only writes event files.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.set_verbosity(logging.INFO)
    here = str(Path(__file__).parent)

    def ours(record: std_logging.LogRecord) -> bool:
        return record.levelno >= std_logging.WARNING or record.pathname.startswith(here)

    logging.get_absl_handler().addFilter(ours)
    logging.get_absl_handler().python_handler.setFormatter(
        std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    )


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


@contextlib.contextmanager
def exit_with_sentence() -> Iterator[None]:
    """Turns the errors a user can mend into `Error: ...` and exit status 2.

    With `--verbosity=1` the stack trace is kept, for those who mend the program instead.
    """
    try:
        yield
    except (ValueError, OSError, RunError) as error:
        if logging.get_verbosity() >= logging.DEBUG:
            raise
        sys.exit(report(_sentence(error)))


def report(sentence: str) -> int:
    """Prints `Error: ...`; returns the exit status of a mistake, 2."""
    print(f"Error: {sentence}", file=sys.stderr)
    return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({error.filename or 'while writing'}): free space and run again."
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write or read {error.filename}: {error.strerror}. Choose another directory."
    return str(error)
