"""Folders of images with the prompts that they were drawn for.

Three layouts are read:

- a .jsonl file with a line per image, {"file": ..., "prompt": ..., metadata}, as `pec_jax.sample`
  writes it (`images.jsonl`);
- a file of prompts, one a line, and as many subfolders of images, in the order of their names;
- subfolders that each hold their prompt in `metadata.jsonl`, as GenEval has them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pec_jax.data.prompts import Prompt, PromptError, read_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LISTING = "images.jsonl"
PER_FOLDER = "metadata.jsonl"
MAX_SIDE = 16384  # pixels

# What Pillow raises of a damaged file; of a PNG also SyntaxError.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images and what they were drawn for.

    Attributes:
        root: directory of the images.
        files: their paths below it.
        prompts: of each image.
        groups: of each image, the number of its prompt among the different ones.
    """

    root: Path
    files: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    groups: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def members(self) -> list[list[int]]:
        """The images of each prompt, by their numbers."""
        found: list[list[int]] = [[] for _ in range(max(self.groups) + 1)]
        for image, group in enumerate(self.groups):
            found[group].append(image)
        return found


def read_image_set(root: Path, prompts: Path | None) -> ImageSet:
    """Finds images and their prompts.

    Args:
        root: directory of the images.
        prompts: .jsonl or .txt; None looks for `images.jsonl`, then for a `metadata.jsonl` in each
            subfolder.

    Raises:
        PromptError: no images, no prompts, or some that do not fit each other.
    """
    if not root.is_dir():
        raise PromptError(f"{root}: no such directory of images.")
    if prompts is None and (root / LISTING).is_file():
        prompts = root / LISTING
    if prompts is None:
        return _from_folders(root, [_own_prompt(folder) for folder in _folders(root)])
    lines = list(read_prompts(prompts))
    if any("file" in line.metadata for line in lines):
        return _from_listing(root, prompts, lines)
    return _from_folders(root, lines, prompts)


def read_images(image_set: ImageSet, numbers: Sequence[int]) -> np.ndarray:
    """Pixels [N, H, W, 3] uint8 of images of one size.

    Raises:
        PromptError: one that cannot be read.
    """
    return np.stack([_read(image_set.root / image_set.files[i]) for i in numbers])


def image_size(image_set: ImageSet, number: int) -> tuple[int, int]:
    """(height, width) of an image, from its header.

    Raises:
        PromptError: it cannot be read, or is larger than any that a model draws.
    """
    path = image_set.root / image_set.files[number]
    try:
        with Image.open(path) as image:
            width, height = image.size
    except _UNREADABLE as error:
        raise PromptError(f"{path}: not an image that can be read ({error}).") from error
    if max(width, height) > MAX_SIDE:
        raise PromptError(f"{path}: {width} x {height} pixels; at most {MAX_SIDE} a side are read.")
    return height, width


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except _UNREADABLE as error:
        raise PromptError(f"{path}: not an image that can be read ({error}).") from error


def _from_listing(root: Path, source: Path, lines: Sequence[Prompt]) -> ImageSet:
    files, prompts = [], []
    for number, line in enumerate(lines, start=1):
        metadata = dict(line.metadata)
        name = metadata.pop("file", None)
        if not isinstance(name, str) or not _is_inside(root, name):
            raise PromptError(f"{source}, image {number}: 'file' must name a file below {root}.")
        if not (root / name).is_file():
            raise PromptError(f"{source}, image {number}: there is no {name} in {root}.")
        files.append(name)
        prompts.append(Prompt(line.text, metadata))
    return _grouped(root, files, prompts)


def _from_folders(root: Path, prompts: Sequence[Prompt], source: Path | None = None) -> ImageSet:
    folders = _folders(root)
    if not folders:
        raise PromptError(
            f"{root}: holds neither {LISTING} nor a subfolder per prompt; give --prompts with a "
            'line {"file": ..., "prompt": ...} per image.'
        )
    if len(folders) != len(prompts):
        raise PromptError(
            f"{source} has {len(prompts)} prompts, but {root} has {len(folders)} subfolders with "
            "images: there must be one for each prompt, in the order of their names."
        )
    files, texts = [], []
    for folder, prompt in zip(folders, prompts):
        inside = sorted(_images(folder), key=_natural)
        files += inside
        texts += [prompt] * len(inside)
    names = [os.path.relpath(file, root) for file in files]
    return _grouped(root, names, texts)


def _own_prompt(folder: Path) -> Prompt:
    path = folder / PER_FOLDER
    if not path.is_file():
        raise PromptError(
            f"{folder}: has no {PER_FOLDER} with its prompt; give the prompts with --prompts."
        )
    return next(read_prompts(path))


def _folders(root: Path) -> list[Path]:
    """Subfolders with images, in the order of their names, numbers by their size."""
    found = [folder for folder in root.iterdir() if folder.is_dir() and any(_images(folder))]
    return sorted(found, key=_natural)


def _images(folder: Path) -> Iterator[Path]:
    """Those of a folder and of its own subfolders; a contact sheet is none."""
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.stem != "grid":
            yield path


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts "10" behind "9"."""
    parts = re.split(r"(\d+)", os.fspath(path))
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _is_inside(root: Path, name: str) -> bool:
    return (root / name).resolve().is_relative_to(root.resolve())


def _grouped(root: Path, files: Sequence[str], prompts: Sequence[Prompt]) -> ImageSet:
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(repr((p.text, p.metadata)), len(numbers)) for p in prompts]
    return ImageSet(root, tuple(files), tuple(prompts), tuple(groups))
