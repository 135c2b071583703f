"""What a person sees of a run: metric files, TensorBoard, the progress bar, image grids.

Nothing here runs inside jit.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
from absl import logging
from etils import epath
from PIL import Image, ImageDraw
from tqdm import tqdm

from pec_jax import io

if TYPE_CHECKING:
    from clu import metric_writers


class RunFiles(Protocol):
    """The part of a `RunDirectory` that is written to here."""

    path: epath.Path
    metrics_file: epath.Path
    samples: epath.Path


class MetricWriter:
    """Writes scalars and image grids to `metrics.jsonl`, TensorBoard (through clu) and PNGs.

    Lines of `metrics.jsonl` later than `resume_step` are dropped on opening: a run that was
    killed and resumed leaves the same file as one that was not.
    """

    def __init__(self, directory: RunFiles, resume_step: int):
        self._samples = directory.samples
        self._lines = io.LineFile(
            directory.metrics_file, keep=lambda line: _is_until(line, resume_step)
        )
        self._tensorboard = _TensorBoard(os.fspath(directory.path))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics for iteration `step`; see `io.LineFile.add` for when it is safe."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {
            "step": int(step),
            **{k: v if np.isfinite(v) else str(v) for k, v in sorted(numbers.items())},
        }
        self._lines.add(json.dumps(line))
        self._tensorboard.add(lambda writer: writer.write_scalars(int(step), numbers))

    def grid(self, step: int, images: np.ndarray, captions: Sequence[str]) -> epath.Path:
        """Saves a labelled sample grid; `images` [rows, columns, H, W, 3] in [0, 1]."""
        path = self._samples / f"step_{step:06d}.png"
        picture = image_grid(images, captions)
        save_png(path, picture)
        samples = {"samples": np.asarray(picture)[None]}
        self._tensorboard.add(lambda writer: writer.write_images(int(step), samples))
        return path

    def flush(self) -> None:
        """Returns once the lines so far are safe; before a checkpoint that covers them."""
        self._lines.flush()

    def close(self) -> None:
        """Flushes and closes all files."""
        self._lines.close()
        self._tensorboard.close()


class _TensorBoard:
    """clu's summary writer in a thread, for its tensorflow takes seconds to import.

    An error of the thread is raised by the next call.
    """

    def __init__(self, directory: str):
        self._directory = directory
        self._thread = ThreadPoolExecutor(1)
        self._newest: Future[None] | None = None

    def add(self, write: Callable[[metric_writers.SummaryWriter], None]) -> None:
        """Has the thread call `write`, after those before."""
        if self._newest is not None and self._newest.done():
            self._newest.result()
        self._newest = self._thread.submit(lambda: write(self._writer))

    def close(self) -> None:
        """Returns once everything is written."""
        if self._newest is not None:
            self.add(lambda writer: writer.close())
            self._newest.result()
        self._thread.shutdown()

    @functools.cached_property
    def _writer(self) -> metric_writers.SummaryWriter:
        from clu import metric_writers

        return metric_writers.SummaryWriter(self._directory)


class _NoWriter(MetricWriter):
    """Of the hosts that are not the first, which writes for all."""

    def __init__(self, directory: RunFiles, resume_step: int):
        self._samples = directory.samples

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def grid(self, step: int, images: np.ndarray, captions: Sequence[str]) -> epath.Path:
        """Nothing; where the first host writes it."""
        return self._samples / f"step_{step:06d}.png"

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def make_writer(directory: RunFiles, resume_step: int, *, first: bool) -> MetricWriter:
    """The writer of a host: only the first one writes."""
    return (MetricWriter if first else _NoWriter)(directory, resume_step)


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


class Progress:
    """A progress bar on a terminal, a log line now and then elsewhere."""

    def __init__(self, total: int, start: int, shown: Sequence[str], *, first: bool = True):
        self._shown, self._first = shown, first
        self._total = total
        self._interactive = sys.stderr.isatty() and first
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="it",
            dynamic_ncols=True,
            disable=not self._interactive,
        )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of iteration `step`."""
        text = "  ".join(
            f"{k.split('/', 1)[-1]} {values[k]:.4g}" for k in self._shown if k in values
        )
        if self._interactive:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
        elif self._first and (step % max(1, self._total // 20) == 0 or step == self._total):
            logging.info("iteration %d of %d: %s", step, self._total, text)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._bar.close()
