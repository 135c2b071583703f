"""Config files: the ones we ship by name, anyone's by path, and what they can import."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from pec_jax import configs
from pec_jax.config.errors import unknown
from pec_jax.config.user_file import UserFileError, place_of_errors, run_file

SHIPPED = Path(configs.__path__[0])
_BASE = "base"  # holds every field's default; not a run by itself


def shipped_names() -> list[str]:
    """The configs we ship, by the names that `--config` takes."""
    stems = sorted(path.stem for path in SHIPPED.glob("*.py"))
    return [stem for stem in stems if not stem.startswith("_") and stem != _BASE]


def load_config(name: str) -> ConfigDict:
    """Loads a config.

    Args:
        name: one that we ship, such as "shapes_pec", or a path to a Python file with a function
            `get_config`. What follows a colon is passed to that function.

    Returns:
        The config, locked: an assignment to a field that it lacks is an error.

    Raises:
        UserFileError: there is no such config, or it fails.
    """
    name, colon, argument = name.partition(":")
    path = find(name)
    kind = "config file"
    with importable(path):
        module = run_file(path, "pec_jax_config_file", kind)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserFileError(f"{kind} {path} has no function get_config().")
        with place_of_errors(path, kind):
            config = get_config(*[argument] if colon else [])
    if not isinstance(config, ConfigDict):
        raise UserFileError(
            f"{kind} {path}: get_config() returns {type(config).__name__}, not a ConfigDict; start "
            "from pec_jax.configs.base.get_config(), which sets every field."
        )
    return config.lock()


def find(name: str) -> Path:
    """The file of a config: the name of one we ship, or a path.

    Raises:
        UserFileError: there is none; the message lists those that we ship.
    """
    path, names = Path(name).expanduser(), shipped_names()
    if name in (*names, _BASE):
        return SHIPPED / f"{name}.py"
    if path.exists() and name:
        return path
    if path.suffix == ".py" or os.sep in name:
        near = difflib.get_close_matches(path.stem, names, n=1)
        hint = f" Did you mean --config={near[0]}, which we ship?" if near else ""
        listing = f" Shipped configs: {', '.join(names)}." if not near else ""
        raise UserFileError(f"config file {name} does not exist.{hint}{listing}")
    raise UserFileError(f"{unknown('config', name, names)} A config of your own ends in .py.")


@contextlib.contextmanager
def importable(path: Path) -> Iterator[None]:
    """Lets a config file import others as `configs.x`, wherever it lies and from wherever it runs.

    `configs.x` is a neighbour of the file if both lie in a directory `configs`, and otherwise the
    config that we ship, as the same module as `pec_jax.configs.x`. Nothing of it stays in place:
    another package called `configs` is what it was before.
    """
    finder = _ConfigsFinder(path)
    before = _take_configs()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _take_configs()
        sys.modules.update(before)


def _take_configs() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == "configs" or name.startswith("configs.")]
    return {name: sys.modules.pop(name) for name in names}


class _ConfigsFinder(importlib.abc.MetaPathFinder):
    """Finds `configs` and its modules on behalf of one config file."""

    def __init__(self, path: Path):
        self._path = path.resolve()
        folders = {path.absolute().parent, self._path.parent}  # of a symbolic link: both ends
        self._neighbours = [str(f) for f in sorted(folders) if f.name == "configs" and f != SHIPPED]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The neighbour of that name, or else the shipped config."""
        if fullname == "configs":
            spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
            spec.submodule_search_locations = [*self._neighbours, str(SHIPPED)]
            return spec
        package, _, name = fullname.rpartition(".")
        if package != "configs":
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, self._neighbours)
        # A file called like a shipped one that imports it does not mean itself.
        if found and not (found.origin and Path(found.origin).resolve() == self._path):
            return found
        if not importlib.util.find_spec(f"pec_jax.configs.{name}"):
            return None
        return importlib.machinery.ModuleSpec(fullname, _Alias(f"pec_jax.configs.{name}"))


class _Alias(importlib.abc.Loader):
    """Loads a module under a second name."""

    def __init__(self, name: str):
        self._name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module itself."""
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Has run already; undoes what the import system wrote into it."""
        module.__spec__ = self._spec
