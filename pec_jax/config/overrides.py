"""Checks `--config.a.b=v` against the fields of a config before they are applied."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from pec_jax.config.errors import ConfigError

_OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)")


def overridden(config: ConfigDict, fields: Mapping[str, str]) -> ConfigDict:
    """A copy of a config with fields set as `--config.FIELD=VALUE` sets them.

    Args:
        config: stays as it is.
        fields: dotted field, without "config." -> value as it is typed.

    Raises:
        ConfigError: a field that does not exist, or a value that is not of its type.
    """
    argv = ["", *(f"--config.{field}={value}" for field, value in fields.items())]
    copy = ConfigDict(config.to_dict()).lock()
    check_overrides(copy, argv)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", copy, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return holder.value


def check_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
    """Checks that every field that is overridden exists.

    Args:
        config: what the overrides are applied to.
        argv: the command line, or any part of it.

    Raises:
        ConfigError: a field that does not exist, with the nearest and all valid ones.
    """
    for argument in argv:
        match = _OVERRIDE.match(argument)
        if match:
            section = _check(config, match[1].split("."))
            value = argument.partition("=")[2].strip()
            if isinstance(section, ConfigDict) and value and not value.startswith("{"):
                raise ConfigError(_is_a_section(f"config.{match[1]}", section))


def _is_a_section(where: str, section: ConfigDict) -> str:
    field = "weight" if "weight" in section else min(section, default="FIELD")
    return (
        f"{where} is a section, not a value: set one of its fields, as in --{where}.{field}=... "
        f"Valid: {', '.join(sorted(section))}."
    )


def _check(config: ConfigDict, names: Sequence[str]) -> Any:
    """What stands there."""
    section, where = config, "config"
    for name in names:
        if not isinstance(section, ConfigDict):
            raise ConfigError(f"{where} is a value, not a section: it has no field {name!r}.")
        if name not in section:
            near = _nearest(name, where, section, config)
            hint = f" Did you mean {near}?" if near else ""
            valid = ", ".join(sorted(section))
            raise ConfigError(f"{where} has no field {name!r}.{hint} Valid: {valid}.")
        section, where = section[name], f"{where}.{name}"
    return section


def _nearest(name: str, where: str, section: ConfigDict, config: ConfigDict) -> str | None:
    """The field that was meant: misspelt, abbreviated (lr), or of another section."""
    initials = {"".join(word[0] for word in f.split("_") if word): f for f in section}
    if name in initials:
        return f"{where}.{initials[name]}"
    if near := difflib.get_close_matches(name, list(section), n=1):
        return f"{where}.{near[0]}"
    elsewhere = {path.rpartition(".")[2]: path for path in _paths(config, "config")}
    near = difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.8)
    return elsewhere[near[0]] if near else None


def _paths(section: ConfigDict, where: str) -> Iterator[str]:
    for name in section:
        yield f"{where}.{name}"
        if isinstance(section[name], ConfigDict):
            yield from _paths(section[name], f"{where}.{name}")
