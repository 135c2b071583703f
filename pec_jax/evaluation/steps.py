"""The curves of a run, as its files have them."""

from __future__ import annotations

import json
from pathlib import Path

from pec_jax.errors import FileError


def read_steps(path: Path) -> list[dict[str, float]]:
    """The training lines of a `metrics.jsonl`, in order; evaluations are left out.

    Numbers that were not finite, which JSON cannot hold, come back as such.

    Raises:
        FileError: a line that holds something else than numbers by name.
    """
    return [line for line in _lines(path) if "reward/mean" in line]


def read_evaluations(directory: Path) -> list[dict[str, float]]:
    """A finished run's evaluations: of the base model (step 0), on the way, and at the end.

    The base model's distance from itself is 0.
    """
    last = json.loads((directory / "eval.json").read_text(encoding="utf-8"))
    base = {n.removeprefix("base/"): v for n, v in last.items() if n.startswith("base/")}
    base |= {name: 0.0 for name in last if name.startswith("distance/")}
    on_the_way = [line for line in _lines(directory / "metrics.jsonl") if "count/prompts" in line]
    return [base | {"step": 0}, *on_the_way, last | {"step": last["iterations"]}]


def _lines(path: Path) -> list[dict[str, float]]:
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append({name: float(value) for name, value in json.loads(line).items()})
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise FileError(
                f"{path}, line {number}: not a JSON object of numbers ({error}); if the run is not "
                "finished, resume it, which drops torn lines"
            ) from error
    return found
