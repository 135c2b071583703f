"""How mistakes reach a person: one sentence and an exit status, no stack trace."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator

from absl import logging


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
        sys.exit(_fail(_sentence(error)))


def _fail(sentence: str) -> int:
    print(f"Error: {sentence}", file=sys.stderr)
    return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'while writing'}): free space and run again."
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write or read {error.filename}: {error.strerror}. Choose another directory."
    return str(error)
