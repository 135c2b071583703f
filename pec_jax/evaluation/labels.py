"""What a run is called in the table: method, space and weight, from the definitions it names.

Names that no definition has, such as those of a plugin that is not loaded, stand for themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pec_jax.config.fields import build
from pec_jax.config.registry import CONSTRAINTS, OBJECTIVES

# The paper's rows leave this objective out, unless it is all there is to name.
PAPERS_OBJECTIVE = "grpo"
LATENT = "latent"


class Label(NamedTuple):
    """The first three columns of the table."""

    method: str
    space: str
    weight: str


class _Part(NamedTuple):
    """What one constraint that is on adds to a label."""

    name: str
    alone: str  # the name where no other constraint is on; {objective} stands for the objective's
    space: str
    weight: str


def label_of(config: Mapping[str, Any]) -> Label:
    """The label of a run.

    One constraint is called as in the paper ("PEC", "Flow-GRPO w/ KL"), several are joined
    ("PEC + KL"), and so are their spaces and weights. An objective other than the paper's is
    named as well ("DiffusionNFT + PEC").

    Args:
        config: as in config.json.

    Raises:
        ConfigError: a section of a constraint that its definition does not take.
    """
    name = config["objective"]["name"]
    objective = OBJECTIVES[name].label if name in OBJECTIVES else name
    parts = [
        part
        for constraint, section in config["constraints"].items()
        if (part := _part(constraint, section, config["perception"]["encoder"]))
    ]
    parts.sort(key=lambda part: bool(part.alone))  # "PEC + KL", since KL says "... w/ KL" by itself
    space = " + ".join(dict.fromkeys(part.space for part in parts if part.space))
    weight = " + ".join(part.weight for part in parts if part.weight)
    if not parts:
        return Label(objective, "", "")
    if len(parts) == 1 and parts[0].alone:
        return Label(parts[0].alone.format(objective=objective), space, weight)
    prefix = [] if name == PAPERS_OBJECTIVE else [objective]
    return Label(" + ".join([*prefix, *(part.name for part in parts)]), space, weight)


def without_what_is_off(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the sections that leave no trace in a run.

    Two runs that differ in these alone, or in which plugins were loaded, are one config.

    Args:
        config: as in config.json.
    """
    chosen = config["objective"]["name"]
    spaces = set(re.findall(r"[^\W\d]\w*", config["perception"]["encoder"]))
    return {
        **config,
        "objective": {"name": chosen, chosen: config["objective"].get(chosen, {})},
        "constraints": {
            name: section
            for name, section in config["constraints"].items()
            if _part(name, section, "")
        },
        "rewards": {
            name: section
            for name, section in config["rewards"].items()
            if section["weight"] or section["evaluate"]
        },
        "encoders": {
            name: section
            for name, section in config["encoders"].items()
            if name in spaces or section["evaluate"]
        },
    }


def _part(name: str, section: Mapping[str, Any], encoder: str) -> _Part | None:
    """What a constraint adds to the label; nothing if it is off."""
    in_space = LATENT if section.get("space") == LATENT else encoder
    if name not in CONSTRAINTS:
        if section.get("weight") == 0:
            return None
        weight = _number(section.get("weight", ""))
        return _Part(name, "", in_space if "space" in section else "", weight)
    definition = CONSTRAINTS[name]
    options = build(definition.options, section, f"config.constraints.{name}")
    if not definition.is_on(options):
        return None
    weight = _number(getattr(options, definition.parameter, ""))
    space = in_space if definition.uses_space else ""
    return _Part(definition.label, definition.label_alone, space, weight)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
