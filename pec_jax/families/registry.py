"""The kinds of pipelines there are, told apart by model_index.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pec_jax.io import read_json
from pec_jax.weights.tensors import WeightsError


@dataclasses.dataclass(frozen=True)
class Family:
    """What diffusers fixes for one class of pipelines.

    Attributes:
        name: "sd3" or "flux".
        pipeline: the class that model_index.json names.
        parts: component -> the class it must have. (Tokenizers come in several classes, slow and
            fast, which all read the same files.)
        text_encoders: component -> class, of the text encoders.
        optional: text encoders that may be absent.
        towers: text encoder -> its name in `models.text`.
        t5_length: tokens that T5 sees by default.
    """

    name: str
    pipeline: str
    parts: Mapping[str, str]
    text_encoders: Mapping[str, str]
    optional: tuple[str, ...]
    towers: Mapping[str, str]
    t5_length: int


def _parts(transformer: str) -> dict[str, str]:
    return {
        "transformer": transformer,
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }


FAMILIES = (
    Family(
        name="sd3",
        pipeline="StableDiffusion3Pipeline",
        parts=_parts("SD3Transformer2DModel"),
        text_encoders={
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        optional=("text_encoder_3",),
        towers={"text_encoder": "clip", "text_encoder_2": "clip_2", "text_encoder_3": "t5"},
        t5_length=256,
    ),
    Family(
        name="flux",
        pipeline="FluxPipeline",
        parts=_parts("FluxTransformer2DModel"),
        text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        optional=(),
        towers={"text_encoder": "clip", "text_encoder_2": "t5"},
        t5_length=512,
    ),
)


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
        if family.pipeline == found:
            for part, class_name in family.parts.items():
                _check_part(path, part, class_name)
            return family
    known = ", ".join(family.pipeline for family in FAMILIES)
    raise WeightsError(f"{path}: is a {found}; supported: {known}")


def present_text_encoders(directory: Path, family: Family) -> dict[str, str]:
    """The text encoders that a pipeline has, component -> class.

    Raises:
        WeightsError: one that must be there is absent, or is of another class.
    """
    path = directory / "model_index.json"
    present = {}
    for part, class_name in family.text_encoders.items():
        if part in family.optional and _class_of(path, part) is None:
            continue
        _check_part(path, part, class_name)
        present[part] = class_name
    return present


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
