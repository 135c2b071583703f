"""All fields of a config in words, for `--help`."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from pec_jax.config.files import load_config, shipped_names
from pec_jax.config.schema import Config

_WIDTH = 80


def describe() -> str:
    """The shipped configs, and a paragraph per field: name, type, range, meaning and default."""
    shipped = _paragraph("Shipped configs: " + ", ".join(shipped_names()) + ".", 0)
    head = _paragraph(
        "Fields, each set by --config.FIELD=VALUE, with the defaults of configs/base.py, which the "
        "shipped configs change:",
        0,
    )
    values = load_config("base").to_dict()
    return "\n".join([shipped, "", head, *_section(Config, values, "")])


def _section(cls: type, values: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, value = f"{prefix}{field.name}", values[field.name]
        registry = field.metadata.get("registry") or field.metadata.get("choice")
        if registry:
            if "choice" in field.metadata:
                yield _line(f"{name}.name", " | ".join(registry), value["name"])
            for entry in registry:
                yield from _section(registry[entry].options, value[entry], f"{name}.{entry}.")
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from _section(hints[field.name], value, f"{name}.")
        else:
            meaning = f"{_kind(field, hints[field.name])}. {field.metadata['help']}"
            yield _line(name, meaning, value)


def _kind(field: dataclasses.Field, hint: Any) -> str:
    if choices := field.metadata.get("choices"):
        return " | ".join(choices)
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if low is None and high is None:
        return name
    if low is None or high is None:
        return f"{name}, at least {low}" if high is None else f"{name}, at most {high}"
    return f"{name}, {low} to {high}"


def _line(name: str, meaning: str, default: Any) -> str:
    return f"  {name}\n{_paragraph(f'{meaning} [{default!r}]', 6)}"


def _paragraph(text: str, indent: int) -> str:
    margin = " " * indent
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
