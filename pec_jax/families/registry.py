"""The families there are, told apart by model_index.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pec_jax.config import unknown
from pec_jax.families.base import Pipeline
from pec_jax.families.flux import Flux1
from pec_jax.families.networks import Network
from pec_jax.families.sd3 import StableDiffusion3
from pec_jax.families.text import TextEncoder
from pec_jax.io import read_json
from pec_jax.weights.published import Files
from pec_jax.weights.tensors import WeightsError

Family = type[Pipeline]
FAMILIES: tuple[Family, ...] = (StableDiffusion3, Flux1)


def named_family(name: str) -> Family:
    """The family of a short name, such as "flux".

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(unknown("family", name, [family.name for family in FAMILIES]))


def read_family(directory: Path) -> Family:
    """The family of a pipeline directory, whose model_index.json must fit it.

    Args:
        directory: holds model_index.json.

    Returns:
        The family.

    Raises:
        WeightsError: no such directory, no model_index.json, a pipeline of another class, or a
            part of another class: families are not mixed.
    """
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such model directory")
    path = directory / "model_index.json"
    found = read_json(path).get("_class_name")
    for family in FAMILIES:
        if family.class_name == found:
            _check_part(path, "transformer", family.transformer_network.class_name)
            _check_part(path, "vae", family.vae_network.class_name)
            _check_part(path, "scheduler", family.scheduler_class)
            return family
    known = ", ".join(family.class_name for family in FAMILIES)
    raise WeightsError(f"{path}: is a {found}; supported: {known}")


def present_text_encoders(directory: Path, family: Family) -> list[TextEncoder]:
    """The text encoders that a pipeline has.

    Raises:
        WeightsError: one that must be there is absent, or is of another class.
    """
    path = directory / "model_index.json"
    present = []
    for encoder in family.text_encoders:
        if encoder.optional and _class_of(path, encoder.part) is None:
            continue
        _check_part(path, encoder.part, encoder.class_name)
        present.append(encoder)
    return present


def check_parts(directory: Path, family: Family, parts: Iterable[str]) -> None:
    """Checks that parts which model_index.json names are there.

    Raises:
        WeightsError: one is not; the message says what to do.
    """
    optional = {e.part: (e.part, e.tokenizer) for e in family.text_encoders if e.optional}
    for part in parts:
        if (directory / part).is_dir():
            continue
        without = " and ".join(f'"{name}": [null, null]' for name in optional.get(part, ()))
        raise WeightsError(
            f"{directory / 'model_index.json'}: names {part}, which is not there: fetch the "
            f"directory {part}" + (f", or write {without} to do without" if without else "")
        )


def transformer_network(directory: Path) -> Network:
    """The network of a transformer's directory, whose config.json names its class.

    Raises:
        WeightsError: unreadable, or of a class that no family has.
    """
    path = directory / "config.json"
    found = read_json(path).get("_class_name")
    networks = {f.transformer_network.class_name: f.transformer_network for f in FAMILIES}
    if not isinstance(found, str) or found not in networks:
        raise WeightsError(f"{path}: is a {found}; supported: {', '.join(networks)}")
    return networks[found]


def published_pipelines() -> dict[str, Files]:
    """The published architectures of all families, name -> config files."""
    return {name: files for family in FAMILIES for name, files in family.published.items()}


def _class_of(index: Path, part: str) -> str | None:
    entry = read_json(index).get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _check_part(index: Path, part: str, class_name: str) -> None:
    found = _class_of(index, part)
    if found != class_name:
        raise WeightsError(
            f"{index}: {part} is {'absent' if found is None else f'a {found}'}; "
            f"supported: {class_name}"
        )
