"""The view of a run: on a terminal it redraws itself under the log, elsewhere there are lines."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from pec_jax.training.progress import View, make_progress, sparkline

SHOWN = ("reward/mean", "entropy/perceptual")


def terminal(**options):
    return Console(file=io.StringIO(), force_terminal=True, width=100, **options)


def test_elsewhere_there_are_about_twenty_lines(caplog):
    progress = make_progress(200, 0, SHOWN, console=Console(file=io.StringIO()))
    with caplog.at_level("INFO", logger="absl"):
        for step in range(1, 201):
            progress.update(step, {"reward/mean": step / 200, "policy/kl": 1.0})
        progress.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 20
    assert lines[-1] == "iteration 200 of 200: mean 1"


def test_the_other_hosts_are_silent(caplog):
    progress = make_progress(2, 0, SHOWN, first=False, console=terminal())
    with caplog.at_level("INFO", logger="absl"):
        progress.update(2, {"reward/mean": 1.0})
        progress.close()
    assert not caplog.records and not isinstance(progress, View)


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not isinstance(make_progress(2, 0, SHOWN, console=terminal()), View)


def test_the_view_has_what_a_person_waits_for():
    console = terminal()
    progress = make_progress(80, 40, SHOWN, console=console)
    for step in range(41, 81):
        progress.update(step, {"reward/mean": step / 100, "entropy/perceptual": math.nan})
    progress.close()
    last = console.file.getvalue().rpartition("\x1b[2K")[2]
    for part in ("reward/mean", "0.8", "▁", "█", "80/80", "done", "left"):
        assert part in last, last
    assert "entropy/perceptual" not in last  # of which there is no number
    assert not console.file.getvalue().count("\x1b[?25l") > console.file.getvalue().count(
        "\x1b[?25h"
    )


def test_a_terminal_without_unicode_gets_numbers_alone():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, force_terminal=True, width=100)
    progress = make_progress(2, 0, SHOWN, console=console)
    progress.update(1, {"reward/mean": 1.0})
    progress.update(2, {"reward/mean": 2.0})
    progress.close()
    file.flush()
    assert b"reward/mean" in file.buffer.getvalue()


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 4, ""),
        ([math.nan], 4, ""),
        ([1.0], 4, "▁"),
        ([2.0, 2.0, 2.0], 4, "▁▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([0, math.nan, 1], 3, "▁ █"),
        ([-1e300, 1e300], 2, "▁█"),
    ],
)
def test_a_course_in_a_line(values, width, expected):
    assert sparkline(values, width) == expected


PROGRAM = """
import sys
from absl import logging
from pec_jax.errors import quiet_libraries
from pec_jax.training.progress import make_progress
quiet_libraries()
logging.warning("before")
progress = make_progress(3, 0, ("reward/mean",))
for step in (1, 2, 3):
    progress.update(step, {"reward/mean": float(step)})
    logging.warning("during %d", step)
progress.close()
logging.warning("after")
"""


def test_on_a_real_terminal_the_log_stays_above():
    """What is on the screen in the end, of a terminal that is a device of its own."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stderr=secondary,
        stdout=secondary,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(secondary)
    printed = b""
    while True:
        try:
            printed += os.read(primary, 65536)
        except OSError:
            break
    assert process.wait() == 0
    os.close(primary)
    lines = screen(printed.decode())
    texts = ("before", "during 1", "during 2", "during 3", "reward/mean", "3/3", "after")
    said = [next(i for i, line in enumerate(lines) if text in line) for text in texts]
    assert said == sorted(said) and len(set(said)) == 7
    assert sum("reward/mean" in line for line in lines) == 1


def screen(printed):
    """The lines that a terminal shows; of its commands those that are used: up, clear, colours."""
    lines, row = [""], 0
    column = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", printed):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return lines
