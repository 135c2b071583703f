"""From the names in a config to files: the embedded pipeline and prompts, directories, the hub."""

from __future__ import annotations

from pathlib import Path

from etils import epath

from pec_jax import io
from pec_jax.config import ConfigError, unknown
from pec_jax.weights.hub import model_directory

SHAPES_DIRECTORY = Path(__file__).parents[1] / "shapes" / "assets"


def pipeline_directory(name: str, variant: str = "") -> Path:
    """`shapes` is the embedded pipeline; anything else a directory or `hub/id@revision`."""
    return SHAPES_DIRECTORY if name == "shapes" else model_directory(name, variant)


def prompt_file(name: str) -> epath.Path:
    """`shapes/<set>` is an embedded prompt set unless such a file exists; else a file's path."""
    embedded = SHAPES_DIRECTORY / "prompts" / f"{name.removeprefix('shapes/')}.txt"
    if name.startswith("shapes/") and not Path(name).exists():
        if not embedded.is_file():
            sets = [f"shapes/{path.stem}" for path in embedded.parent.iterdir()]
            raise ConfigError("config.prompts: " + unknown("prompt set", name, sets))
        return epath.Path(embedded)
    return io.path(name)
