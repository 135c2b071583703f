"""Runs Python files that a person names on the command line: config files and plugins.

Whatever goes wrong in one is answered by its place, `file, line N`, and the cause.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from pec_jax.errors import RunError


class UserFileError(RunError):
    """A file named on the command line is missing or does not run; the message says where."""


def run_file(path: Path, name: str, kind: str) -> ModuleType:
    """Runs a Python file as the module `name`.

    Args:
        path: the file.
        name: its name in `sys.modules`; what was there is replaced.
        kind: what the file is called in messages, such as "config file".

    Returns:
        The module.

    Raises:
        UserFileError: the file does not exist, is not Python, or fails.
    """
    if path.is_dir():
        raise UserFileError(f"{kind} {path} is a directory; name a Python file (.py).")
    if not path.is_file():
        raise UserFileError(f"{kind} {path} does not exist.")
    if path.suffix != ".py":
        raise UserFileError(f"{kind} {path} is not Python: its name must end in .py.")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        with place_of_errors(path, kind):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def place_of_errors(path: Path, kind: str) -> Iterator[None]:
    """Turns any error of a user's code into one sentence with file and line.

    Raises:
        UserFileError: from the original error, which `--verbosity=1` shows in full.
    """
    try:
        yield
    except UserFileError:
        raise
    except (Exception, SystemExit) as error:
        cause = error.msg if isinstance(error, SyntaxError) else str(error)
        cause = re.sub(r"\s+", " ", cause or "").strip()
        where = _place(error, path)
        raise UserFileError(f"{kind} {where}: {type(error).__name__}: {cause}") from error


def _place(error: BaseException, path: Path) -> str:
    """`file, line N` of the innermost line that the user wrote."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    # Files beside the one that was named are the user's too; libraries are not.
    beside = {str(path.absolute().parent), str(path.resolve().parent), str(path.parent)}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if str(Path(frame.filename).parent) in beside:
            return f"{frame.filename}, line {frame.lineno}"
    return str(path)


def import_plugins(paths: Sequence[str]) -> None:
    """Imports plugins in order, each file once however often and by whichever path it is named.

    A plugin may import modules that lie beside it. Its own module name carries a hash of its path,
    and its directory is searched last, so that a plugin called `json.py` shadows nothing.

    Raises:
        UserFileError: a file does not exist, is not Python, or fails.
    """
    for given in paths:
        path = Path(given).expanduser()
        real = path.resolve()
        stem = re.sub(r"\W", "_", real.stem)
        name = f"pec_jax_plugin_{stem}_{hashlib.sha256(str(real).encode()).hexdigest()[:8]}"
        if name in sys.modules:
            continue
        if str(real.parent) not in sys.path:
            sys.path.append(str(real.parent))
        run_file(path, name, "plugin")
