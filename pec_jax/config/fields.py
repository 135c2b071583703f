"""Fields of a config section: type, range and help in one place, checked in one place.

A section is a frozen dataclass whose fields are made by `field`. `build` turns a plain mapping into
it, `plain` is the inverse.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pec_jax.config.errors import ConfigError, unknown


def field(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field of a section.

    Args:
        help: what it is, in one sentence; for people.
        default: of sections that a definition brings along; the others get theirs from
            configs/base.py.
        low: smallest allowed number.
        high: largest allowed number.
        choices: of a string, the allowed ones.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type, values: Any, where: str) -> Any:
    """A section from a mapping, every field converted and checked.

    Args:
        cls: the section's dataclass.
        values: field -> value. A field with a default may be left out.
        where: the section's name in messages, such as "config.sampler".

    Raises:
        ConfigError: an unknown or missing field, a wrong type, a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a section with fields, not {values!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: " + unknown("field", key, fields))
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ConfigError(
            f"{where} lacks {', '.join(missing)}. Start from configs/base.py, which sets them all."
        )
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: _convert(fields[name], hints[name], values[name], f"{where}.{name}")
            for name in fields
            if name in values
        }
    )


def plain(value: Any) -> Any:
    """Nested dicts, lists and scalars, as JSON has them; the inverse of `build`."""
    if hasattr(value, "sections"):  # a Choice
        return {"name": value.name} | plain(value.sections)
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def defaults(cls: type) -> dict[str, Any]:
    """Field -> default of a section all of whose fields have one."""
    return {f.name: f.default for f in dataclasses.fields(cls)}


def check_value(name: str, metadata: Mapping[str, Any], value: Any) -> None:
    """Raises ConfigError for a value outside the field's choices or range."""
    if choices := metadata.get("choices"):
        if value not in choices:
            raise ConfigError(f"{name}: " + unknown("value", value, choices))
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = metadata.get("low"), metadata.get("high")
    inside = (low is None or value >= low) and (high is None or value <= high)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number.")
    if not inside:
        bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise ConfigError(f"{name} is {value}; it must be {' and '.join(bounds)}.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{name} is an integer beyond 64 bits.")


def _convert(field: dataclasses.Field, hint: Any, value: Any, where: str) -> Any:
    if registry := field.metadata.get("registry"):
        return registry.build_sections(value, where)
    if registry := field.metadata.get("choice"):
        return registry.build_choice(value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return tuple(_scalar(typing.get_args(hint)[0], v, where) for v in _sequence(value, where))
    if origin is not None:  # Mapping[str, tuple[T, ...]]
        item = typing.get_args(typing.get_args(hint)[1])[0]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section with fields, not {value!r}.")
        converted = {
            str(k): tuple(_scalar(item, v, f"{where}.{k}") for v in _sequence(values, where))
            for k, values in value.items()
        }
        return types.MappingProxyType(converted)
    value = _scalar(hint, value, where)
    check_value(where, field.metadata, value)
    return value


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} must be a tuple, not {value!r}.")
    return value


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} must be of type {hint.__name__}, not {value!r}.")
    return value
