"""In what two configs differ, and what of it a run may change when it resumes.

A field may change freely if what has been learned so far would have been the same with its new
value, but for rounding: how long a run is, what is evaluated, logged and kept, and the pieces and
devices over which an iteration is computed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pec_jax.config.errors import ConfigError
from pec_jax.config.schema import Config, from_config_dict, to_dict

# What only training reads: the evaluation of a given model does not depend on it. A field that is
# new counts as read by both until it is here.
OF_TRAINING = frozenset(
    {"num_iterations", "objective", "constraints", "batch", "updates", "optimizer", "schedule"}
)

_FREE = re.compile(
    r"num_iterations|eval\..*|schedule\..*|mesh\..*|model\.remat"
    r"|batch\.(rollout|decode|update)_images|optimizer\.max_skipped"
    r"|prompts\.(heldout|samples)|(rewards|encoders)\.[^.]+\.evaluate"
    r"|rewards\.[^.]+\.max_failures"
)


def since(stored: Mapping[str, Any], config: Config) -> dict[str, str]:
    """`differences` from a config as a run has stored it.

    Definitions and fields with a default that are newer than it count as having that default.
    """
    with contextlib.suppress(ConfigError):  # of another version: all differences are listed
        stored = to_dict(from_config_dict(stored))
    return differences(stored, to_dict(config))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Dotted field -> a line for a person, for each field in which two nested dicts differ."""
    flat_old, flat_new = flatten(old), flatten(new)
    found = {}
    for field in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(field, "(absent)"), flat_new.get(field, "(absent)")
        if before != after:
            found[field] = f"config.{field}: {before!r} there, {after!r} now"
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def binding(fields: Iterable[str]) -> list[str]:
    """Those that a resumed run may not change by itself."""
    return [field for field in fields if not _FREE.fullmatch(field)]


def alters_evaluation(fields: Iterable[str]) -> bool:
    """Whether an evaluation of the same model may give other numbers."""
    return any(field.split(".")[0] not in OF_TRAINING for field in fields)
