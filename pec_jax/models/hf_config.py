"""Reading Hugging Face `config.json` dictionaries into frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pec_jax.models.layers import ACTIVATIONS

T = TypeVar("T")


def select(cls: type[T], values: Mapping[str, Any], **overrides: Any) -> T:
    """Builds a config from the entries that it knows; the others do not touch the maths.

    Args:
        cls: a dataclass whose fields are named as in config.json; its defaults are those of
            transformers, which old files leave out.
        values: the dictionary of a config.json.
        **overrides: fields given by the caller.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: whatever the dataclass itself finds wrong.
    """
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    known = {name: values[name] for name in names if name in values}
    return cls(**{**known, **overrides})


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError, with key and value in it, unless the value is one of the choices."""
    if value not in choices:
        known = ", ".join(repr(c) for c in choices)
        raise ValueError(f"config.json: {key} = {value!r} is not supported; supported: {known}")


def check_activation(key: str, value: str) -> None:
    """Raises ValueError, with key and value in it, for an activation that we do not have."""
    check_choice(key, value, sorted(ACTIVATIONS))


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError unless the width splits into that many attention heads."""
    if width % heads:
        raise ValueError(
            f"config.json: hidden_size = {width} is not a multiple of num_attention_heads = {heads}"
        )


def square(key: str, value: int | Sequence[int]) -> int:
    """One side of a size that config.json may hold as a number or as [side, side].

    Raises:
        ValueError: the two sides differ.
    """
    if isinstance(value, int):
        return value
    height, width = value
    if height != width:
        raise ValueError(f"config.json: {key} = {value!r} is not supported: it must be square")
    return int(height)
