"""Whether the metrics of a run directory go with its checkpoint: nothing goes missing unsaid."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from typing import Protocol

from etils import epath

from pec_jax.errors import RunError


class RunFiles(Protocol):
    """The part of a `RunDirectory` that is read here."""

    path: epath.Path
    metrics_file: epath.Path
    evaluation_file: epath.Path


def gap(directory: RunFiles, step: int, log_every: int) -> str:
    """What is missing or doubled of the lines up to a checkpoint, in a sentence; empty if nothing.

    Args:
        directory: of the run.
        step: of the checkpoint.
        log_every: every how many iterations a line was written.
    """
    count = collections.Counter(_trained_steps(directory))
    missing = [i for i in range(log_every, step + 1, log_every) if not count[i]]
    doubled = [i for i, times in sorted(count.items()) if times > 1 and i <= step]
    parts = [
        f"{what} {len(steps)} of the lines up to iteration {step} (the first: {steps[0]})"
        for what, steps in (("lacks", missing), ("repeats", doubled))
        if steps
    ]
    if not parts:
        return ""
    return (
        f"{directory.metrics_file} {' and '.join(parts)}: it was changed after it was written, or "
        "config.schedule.log_every was another. The run resumes; its curves have gaps."
    )


def check_new(directory: RunFiles, checkpoint_every: int) -> None:
    """Refuses to begin anew where checkpoints must have been.

    A run that was killed before its first checkpoint is on disk does begin anew; so does one whose
    first could not be written, which the run finds out when it wants to write the second.

    Args:
        directory: of the run, which has no checkpoint.
        checkpoint_every: iterations between two checkpoints; 0 is never but at the end.

    Raises:
        RunError: what else is there shows that checkpoints have been lost.
    """
    reached = max(_trained_steps(directory), default=0)
    lost = checkpoint_every and reached > 2 * checkpoint_every
    if directory.evaluation_file.exists() or lost:
        raise RunError(
            f"{directory.path} has no checkpoint, but "
            + ("a final evaluation" if not lost else f"metrics up to iteration {reached}")
            + ": its checkpoints have been removed. Restore the directory checkpoints/, or choose "
            "another --workdir to train anew."
        )


def _trained_steps(directory: RunFiles) -> Iterator[int]:
    """Of the lines that iterations wrote; of a torn or foreign line, none."""
    if not directory.metrics_file.exists():
        return
    text = directory.metrics_file.read_bytes().decode("utf-8", errors="replace")
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and "reward/mean" in values and "step" in values:
            yield int(values["step"])
