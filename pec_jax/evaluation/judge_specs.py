"""Judges by what a command line says of them: `NAME[:MODEL][,FIELD=VALUE...]`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pec_jax.config import ConfigError
from pec_jax.config.fields import build
from pec_jax.config.registry import Registry


@dataclasses.dataclass(frozen=True)
class Spec:
    """One judge.

    Attributes:
        label: unlike all others; the name, with the model where a name occurs twice.
        name: of its definition.
        options: of it.
    """

    label: str
    name: str
    options: Any


def parse_specs(texts: Sequence[str], registry: Registry, flag: str) -> list[Spec]:
    """Judges in the order given.

    Args:
        texts: such as "clip:models/clip-l14" or "remote,url=http://localhost:8000".
        registry: that knows their names.
        flag: that they were given with, for messages.

    Raises:
        ConfigError: an unknown name or field, a wrong value, or the same judge twice.
    """
    parsed = [_parse(text, registry, flag) for text in texts]
    names = [name for name, _ in parsed]
    specs = []
    for name, values in parsed:
        options = build(registry[name].options, values, f"{flag}={name}")
        label = name if names.count(name) == 1 else f"{name}:{values.get('model', '')}"
        specs.append(Spec(label, name, options))
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{flag}={label} is given twice.")
    return specs


def _parse(text: str, registry: Registry, flag: str) -> tuple[str, Mapping[str, Any]]:
    head, *rest = text.split(",")
    name, colon, model = head.partition(":")
    registry.get_valid(name, flag)
    values: dict[str, Any] = {"model": model} if colon else {}
    for part in rest:
        field, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{flag}={text}: {part!r} is not of the form FIELD=VALUE.")
        values[field] = _typed(registry[name].options, field, value)
    return name, values


def _typed(options: type, field: str, value: str) -> Any:
    """The value as its field's default has it; a text where that does not work, for `build`."""
    default = next((f.default for f in dataclasses.fields(options) if f.name == field), "")
    if isinstance(default, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
