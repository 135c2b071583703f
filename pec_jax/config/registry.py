"""Registries: what can be named in a config, each entry defined in one file.

A definition has a `name` and a section of options (`options`, a frozen dataclass made of
`fields.field`s with defaults). Registering it is all that it takes: its section appears in
configs/base.py, in the flags, in `--help` and in the validation. Definitions that come with the
package are found by importing all modules of a registry's package; a user's own register
themselves when their file is imported (`--plugin=path/to/file.py`).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from pec_jax.config.errors import ConfigError, unknown
from pec_jax.config.fields import build, defaults


@runtime_checkable
class Definition(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str:
        """Under which a config names it."""
        ...

    @property
    def options(self) -> type:
        """The dataclass of its section; all fields have defaults."""
        ...

    @property
    def origin(self) -> str:
        """The module that defines it."""
        ...


D = TypeVar("D", bound=Definition)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One entry chosen by name, beside the options of all.

    In a config it is one section: `name`, and a section per entry.
    """

    name: str
    sections: Mapping[str, Any]

    @property
    def options(self) -> Any:
        """Of the chosen one."""
        return self.sections[self.name]


class Registry(Generic[D]):
    """Name -> definition.

    Attributes:
        kind: what an entry is called in messages.
    """

    def __init__(self, kind: str, package: str):
        """`package`: the package (or module) whose modules define the entries we ship."""
        self.kind = kind
        self._package = package
        self._entries: dict[str, D] = {}
        self._loaded = False

    def register(self, definition: D) -> D:
        """Adds an entry.

        Raises:
            ValueError: the name is taken by a definition of another module, or an option lacks a
                default.
        """
        taken = self._entries.get(definition.name)
        # Running a notebook cell again defines the same thing anew: that replaces it.
        if taken is not None and taken.origin != definition.origin:
            raise ValueError(
                f"The {self.kind} name {definition.name!r} is already taken by {taken.origin}."
            )
        build(definition.options, {}, f"the options of the {self.kind} {definition.name!r}")
        self._entries[definition.name] = definition
        return definition

    def __getitem__(self, name: str) -> D:
        self._load()
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def get_valid(self, name: str, where: str) -> D:
        """The entry of that name.

        Raises:
            ConfigError: there is none; the message lists those there are.
        """
        if name not in self:
            raise ConfigError(f"{where}: " + unknown(self.kind, name, self))
        return self[name]

    def default_sections(self) -> dict[str, dict[str, Any]]:
        """Name -> options with their defaults, for configs/base.py."""
        return {name: defaults(self[name].options) for name in self}

    def build_sections(self, values: Any, where: str) -> Mapping[str, Any]:
        """Name -> options of every entry; a section that is left out has its defaults.

        Raises:
            ConfigError: a section of no entry, or a field of it that is wrong.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} must be a section with fields, not {values!r}.")
        for name in values:
            self.get_valid(name, where)
        return types.MappingProxyType(
            {n: build(self[n].options, values.get(n, {}), f"{where}.{n}") for n in self}
        )

    def build_choice(self, values: Any, where: str) -> Choice:
        """The chosen entry's name and the options of all.

        Raises:
            ConfigError: no or an unknown name, or as `build_sections`.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
            raise ConfigError(f"{where} must be a section with a name, not {values!r}.")
        self.get_valid(values["name"], f"{where}.name")
        sections = {key: value for key, value in values.items() if key != "name"}
        return Choice(values["name"], self.build_sections(sections, where))

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{self._package}.{module.name}")


CONSTRAINTS: Registry = Registry("constraint", "pec_jax.rl.constraints")
OBJECTIVES: Registry = Registry("objective", "pec_jax.rl.objectives")
REWARDS: Registry = Registry("reward", "pec_jax.rewards")
ENCODERS: Registry = Registry("encoder", "pec_jax.perception.encoders")
