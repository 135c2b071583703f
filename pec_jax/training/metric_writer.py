"""What a run leaves of its numbers and pictures: metric files, image grids, what loggers are told.

Nothing here runs inside jit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from pec_jax import io
from pec_jax.training.loggers import Loggers


class RunFiles(Protocol):
    """The part of a `RunDirectory` that is written to here."""

    path: epath.Path
    metrics_file: epath.Path
    samples: epath.Path


class MetricWriter:
    """Writes scalars and image grids to `metrics.jsonl` and PNGs, and tells the loggers.

    Lines of `metrics.jsonl` later than `resume_step` are dropped on opening: a run that was
    killed and resumed leaves the same file as one that was not.
    """

    def __init__(self, directory: RunFiles, resume_step: int, loggers: Loggers):
        self._samples = directory.samples
        self._lines = io.LineFile(
            directory.metrics_file, keep=lambda line: _is_until(line, resume_step)
        )
        self._loggers = loggers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics for iteration `step`; see `io.LineFile.add` for when it is safe."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {
            "step": int(step),
            **{k: v if np.isfinite(v) else str(v) for k, v in sorted(numbers.items())},
        }
        self._lines.add(json.dumps(line))
        self._loggers.scalars(int(step), numbers)

    def ends(self, step: int, values: Mapping[str, float]) -> None:
        """The evaluation before or after training, which has files of its own, for the loggers."""
        self._loggers.scalars(int(step), {name: float(value) for name, value in values.items()})

    def grid(self, step: int, images: np.ndarray, captions: Sequence[str]) -> epath.Path:
        """Saves a labelled sample grid; `images` [rows, columns, H, W, 3] in [0, 1]."""
        path = self._samples / f"step_{step:06d}.png"
        picture = image_grid(images, captions)
        save_png(path, picture)
        self._loggers.image(int(step), "samples", np.asarray(picture))
        return path

    def flush(self) -> None:
        """Returns once the lines so far are safe; before a checkpoint that covers them."""
        self._lines.flush()

    def close(self) -> None:
        """Flushes and closes all files."""
        self._lines.close()
        self._loggers.close()


class _NoWriter(MetricWriter):
    """Of the hosts that are not the first, which writes for all."""

    def __init__(self, directory: RunFiles, resume_step: int, loggers: Loggers):
        self._samples = directory.samples

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def ends(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def grid(self, step: int, images: np.ndarray, captions: Sequence[str]) -> epath.Path:
        """Nothing; where the first host writes it."""
        return self._samples / f"step_{step:06d}.png"

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def make_writer(
    directory: RunFiles, resume_step: int, loggers: Loggers, *, first: bool
) -> MetricWriter:
    """The writer of a host: only the first one writes."""
    return (MetricWriter if first else _NoWriter)(directory, resume_step, loggers)


def _is_until(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False  # a line that a crash cut short


def save_png(path: epath.Path, picture: Image.Image) -> None:
    """Saves a PNG, whole or not at all."""
    io.replace_file(path, lambda temporary: picture.save(temporary, format="PNG"))


def to_picture(image: np.ndarray) -> Image.Image:
    """An image [H, W, 3] in [0, 1] as 8-bit RGB, rounded to the nearest level."""
    return Image.fromarray(np.round(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8))


def image_grid(images: np.ndarray, captions: Sequence[str], *, cell: int = 64) -> Image.Image:
    """A contact sheet: one captioned row a prompt.

    Args:
      images: [rows, columns, H, W, 3] in [0, 1].
      captions: one text a row; may be empty strings.
      cell: images narrower than this are enlarged by a whole factor, without smoothing.

    Returns:
      The sheet as a PIL image.
    """
    rows, columns, height, width, _ = images.shape
    factor = max(1, -(-cell // width))
    height, width, gap, label = height * factor, width * factor, 2, 16
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + gap + label) + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = gap + row * (height + gap + label)
        draw.text((gap + 2, top + 2), captions[row], fill="black")
        for column in range(columns):
            picture = to_picture(images[row, column])
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * (width + gap), top + label))
    return sheet
