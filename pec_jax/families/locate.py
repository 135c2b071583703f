"""From the names in a config to files: the embedded pipeline and prompts, directories, the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from etils import epath

from pec_jax import io
from pec_jax.config import ConfigError, unknown
from pec_jax.weights.hub import model_directory, model_path
from pec_jax.weights.tensors import WeightsError

SPLITS = ("train", "test")
SHAPES_DIRECTORY = Path(__file__).parents[1] / "shapes" / "assets"


def pipeline_directory(name: str, variant: str = "", transformer: str = "") -> Path:
    """Where a pipeline is.

    Args:
        name: `shapes` is the embedded one; anything else a directory or `hub/id@revision`.
        variant: such as "fp16".
        transformer: as in `transformer_path`; where it is given, the pipeline's own is not fetched.

    Raises:
        WeightsError: there is none; or it is a file, which holds no whole pipeline.
    """
    if name == "shapes":
        return SHAPES_DIRECTORY
    if io.path(name).is_file():
        raise WeightsError(
            f"{name}: is a file, and a pipeline has more parts than one file holds: give it as "
            "config.model.transformer, and as config.model.path the pipeline that the other parts "
            "come from, such as stabilityai/stable-diffusion-3.5-medium@COMMIT"
        )
    return model_directory(name, variant, ("transformer",) if transformer else ())


def transformer_path(name: str, *, weights: bool = True) -> Path | None:
    """Where the transformer is that takes the place of its pipeline's own.

    Args:
        name: a file of weights, a directory or a hub id; '' is the pipeline's own.
        weights: False where only shapes are asked for, which no file decides.
    """
    if not name or not (weights or io.path(name).is_dir()):
        return None
    return model_path(name)


def prompt_file(name: str, split: str = "train") -> epath.Path:
    """The file of a prompt set.

    Args:
        name: `shapes/<set>` is an embedded one unless such a file exists; else a file, or a
            directory as Flow-GRPO's data sets are: SPLIT_metadata.jsonl or SPLIT.txt.
        split: "train" or "test".

    Raises:
        ConfigError: no such embedded set, or a directory without either file.
    """
    return _prompt_files(name, (split,))[0]


def prompt_files(name: str) -> list[epath.Path]:
    """All files of a prompt set: of a directory, those of both splits that are there.

    Raises:
        ConfigError: as `prompt_file`.
    """
    return _prompt_files(name, SPLITS)


def _prompt_files(name: str, splits: Sequence[str]) -> list[epath.Path]:
    embedded = SHAPES_DIRECTORY / "prompts" / f"{name.removeprefix('shapes/')}.txt"
    if name.startswith("shapes/") and not Path(name).exists():
        if not embedded.is_file():
            sets = [f"shapes/{path.stem}" for path in embedded.parent.iterdir()]
            raise ConfigError("config.prompts: " + unknown("prompt set", name, sets))
        return [epath.Path(embedded)]
    path = io.path(name)
    if not path.is_dir():
        return [path]
    pairs = [(path / f"{split}_metadata.jsonl", path / f"{split}.txt") for split in splits]
    found = [next((file for file in pair if file.is_file()), None) for pair in pairs]
    if not (present := [file for file in found if file is not None]):
        wanted = " or ".join(file.name for pair in pairs for file in pair)
        raise ConfigError(
            f"config.prompts: the directory {path} does not hold {wanted}; give a file, or a "
            "directory with one of them."
        )
    return present
