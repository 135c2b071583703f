"""Reading `config.json` dictionaries into frozen dataclasses, every entry of its type and range.

Messages name entry and value; who has read the file puts its path before them.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pec_jax.models.layers import ACTIVATIONS

T = TypeVar("T")

MAX_SIZE = 2**20  # no width or table of a real model is larger
MAX_LAYERS = 1000
_SHARE = (0.0, 1.0)
# What numbers may be. Whole ones are sizes by default, and others any finite number.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_layers", "num_hidden_layers"), (1, MAX_LAYERS)),
    **dict.fromkeys(("num_single_layers", "dual_attention_layers"), (0, MAX_LAYERS)),
    **dict.fromkeys(("eos_token_id", "num_register_tokens", "axes_dims_rope"), (0, MAX_SIZE)),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon"), _SHARE),
    **dict.fromkeys(("image_size", "size", "crop_size"), (1, 4096)),
    **dict.fromkeys(("sample_size", "pos_embed_max_size"), (1, 8192)),
    **dict.fromkeys(("shift", "max_shift"), (0.01, 100)),
    "image_std": (1e-6, MAX_SIZE),
    "mlp_ratio": (0.1, 100),
    "relative_attention_num_buckets": (4, MAX_SIZE),
    "rope_theta": (1, 1e12),
}


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
        ValueError: an entry of the wrong type or out of range, or whatever the dataclass itself
            finds wrong.
    """
    values = {**values, **overrides}
    check_fields(cls, values)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: values[name] for name in names if values.get(name) is not None})


def check_fields(cls: type, values: Mapping[str, Any]) -> None:
    """Checks the entries that a dataclass has a field for; null stands for its default.

    Args:
        cls: a dataclass with annotations as strings, such as "int" or "tuple[int, ...]".
        values: the dictionary of a config.json.

    Raises:
        ValueError: one is of another type or out of range; or the weights are quantised.
    """
    if values.get("quantization_config"):
        raise ValueError(
            "quantization_config is not supported: use the model's weights in bf16, fp16 or fp32"
        )
    for field in dataclasses.fields(cls):
        value, kind = values.get(field.name), str(field.type).removesuffix(" | None")
        if value is not None:
            check_value(field.name, value, kind)


def check_value(key: str, value: Any, kind: str) -> None:
    """Checks one entry.

    Args:
        key: its name, by which `RANGES` knows its range.
        value: as JSON has it.
        kind: "int", "float", "bool", "str", or "tuple[int, ...]" for a list of whole numbers; what
            is of another kind is not checked.

    Raises:
        ValueError: of another type or out of range.
    """
    what, items = "", [value]
    if kind == "tuple[int, ...]":
        what, kind, items = "a list, each item ", "int", value if _is_list(value) else [None]
    low, high = RANGES.get(key, (1, MAX_SIZE) if kind == "int" else (-math.inf, math.inf))
    if kind == "int":
        right = all(_is_int(item) and low <= item <= high for item in items)
        what += f"a whole number from {low} to {high}"
    elif kind == "float":
        right = _is_finite(value) and low <= value <= high
        what = "a finite number" if math.isinf(high) else f"a number from {low:g} to {high:g}"
    elif kind == "bool":
        right, what = isinstance(value, bool), "true or false"
    else:
        right, what = kind != "str" or isinstance(value, str), "a string"
    if not right:
        raise ValueError(f"{key} = {reprlib.repr(value)} is not supported: it must be {what}")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The entries of a nested config; {} where it is null or absent.

    Raises:
        ValueError: it is no JSON object.
    """
    found = values.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{key} = {reprlib.repr(found)} is not supported: it must be an object")
    return found or {}


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError, with key and value in it, unless the value is one of the choices."""
    if value not in choices:
        known = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{key} = {reprlib.repr(value)} is not supported; supported: {known}")


def check_activation(key: str, value: str) -> None:
    """Raises ValueError, with key and value in it, for an activation that we do not have."""
    check_choice(key, value, sorted(ACTIVATIONS))


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError unless the width splits into that many attention heads."""
    if width % heads:
        raise ValueError(
            f"hidden_size = {width} is not supported: it must be a multiple of "
            f"num_attention_heads = {heads}"
        )


def square(key: str, value: Any) -> Any:
    """One side of a size that config.json may hold as a number or as [side, side].

    Raises:
        ValueError: the two sides differ.
    """
    if not _is_list(value):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise ValueError(f"{key} = {reprlib.repr(value)} is not supported: it must be square")
    return value[0]
