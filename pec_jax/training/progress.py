"""What a run shows while it trains: a view that redraws itself on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
TREND_WIDTH = 32  # characters


def make_progress(
    total: int,
    start: int,
    shown: Sequence[str],
    *,
    first: bool = True,
    console: Console | None = None,
) -> Lines:
    """What shows the progress of a run on this host.

    Args:
      total: iterations of the run.
      start: of them, those that are done already.
      shown: names of the metrics that a person wants to see.
      first: whether this is the host that speaks.
      console: where to; stderr by default.
    """
    console = console or Console(file=sys.stderr)
    if not first:
        return Lines(total, ())
    if console.is_terminal and not console.is_dumb_terminal:
        return View(total, start, shown, console)
    return Lines(total, shown)


class Lines:
    """A log line now and then, about twenty in all."""

    def __init__(self, total: int, shown: Sequence[str]):
        """`shown`: none of a host that is silent."""
        self._total, self._shown = total, shown

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of iteration `step`."""
        if self._shown and (step % max(1, self._total // 20) == 0 or step == self._total):
            numbers = [f"{_short(k)} {values[k]:.4g}" for k in self._shown if k in values]
            logging.info("iteration %d of %d: %s", step, self._total, "  ".join(numbers))

    def close(self) -> None:
        """Leaves the last state on the screen."""


class View(Lines):
    """A progress bar over the last numbers and their course, redrawn in place.

    Log lines appear above it, for as long as it is open.
    """

    def __init__(self, total: int, start: int, shown: Sequence[str], console: Console):
        super().__init__(total, shown)
        self._bar = Progress(
            TextColumn("iteration"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("done,"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("left,"),
            _RateColumn(),
            console=console,
            expand=True,
            speed_estimate_period=120.0,
        )
        self._task = self._bar.add_task("", total=total, completed=start)
        self._courses: dict[str, list[float]] = {name: [] for name in shown}
        self._live = Live(self._render(), console=console, refresh_per_second=4)
        self._live.start()
        console.show_cursor(True)  # which a process that is killed would leave hidden
        # absl has taken stderr as it was; from here on it has to write above the view.
        self._log_stream = logging.get_absl_handler().python_handler
        self._stream = self._log_stream.setStream(sys.stderr)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of iteration `step`."""
        self._bar.update(self._task, completed=step)
        for name, course in self._courses.items():
            course.append(values.get(name, math.nan))
        self._live.update(self._render())

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._live.stop()
        if self._stream is not None:
            self._log_stream.setStream(self._stream)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan")
        table.add_column(justify="right")
        table.add_column(style="dim")
        for name, course in self._courses.items():
            if course and math.isfinite(course[-1]):
                table.add_row(name, f"{course[-1]:.4g}", self._trend(course))
        return Group(table, self._bar)

    def _trend(self, course: Sequence[float]) -> str:
        return "" if self._bar.console.options.ascii_only else sparkline(course, TREND_WIDTH)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{1 / speed:.3g} s/it" if speed < 1 else f"{speed:.3g} it/s")


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of numbers in at most `width` characters of rising height, from least to greatest.

    Args:
      values: [N]; what is not finite leaves a gap.
      width: of the line; each character is a mean over as many of them as it takes.
    """
    means = [
        float(np.mean(known)) if (known := part[np.isfinite(part)]).size else math.nan
        for part in np.array_split(np.asarray(values, np.float64), min(width, len(values)) or 1)
    ]
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    if span <= 1e-9 * abs(low):
        return _BARS[0] * len(means)
    highest: int = len(_BARS) - 1
    return "".join(
        _BARS[round((value - low) / span * highest)] if math.isfinite(value) else " "
        for value in means
    )


def _short(name: str) -> str:
    return name.split("/", 1)[-1]
