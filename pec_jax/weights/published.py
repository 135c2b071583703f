"""Architectures known by name: config files without weights, for commands that need only shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pec_jax.io import write_json

Files = Mapping[str, Mapping[str, Any]]  # path inside the model's directory -> JSON content


def find(path: str, models: Mapping[str, Files]) -> Files | None:
    """The model that the last part of a path or hub id names, whatever its case; or None."""
    return models.get(Path(path.partition("@")[0]).name.lower())


def write(files: Files, directory: Path) -> Path:
    """Writes the config files of an architecture.

    Returns:
        The directory.
    """
    for file, content in files.items():
        write_json(directory / file, content)
    return directory
