"""Rows of the table from run directories: one row per config, one value per seed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from pec_jax import io
from pec_jax.config.changes import flatten
from pec_jax.errors import RunError
from pec_jax.evaluation.labels import Label, label_of, without_what_is_off
from pec_jax.evaluation.table import Row, is_column

BASE = "Base"
# Where a run differs from another in one of these alone, the two are still one row.
IGNORED = ("seed", "schedule", "mesh")
# What a table needs to know of a run's config.
SECTIONS = ("seed", "objective", "constraints", "perception", "rewards", "encoders")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its directory, its config and its final evaluation."""

    directory: epath.Path
    config: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    @property
    def seed(self) -> str:
        """As typed."""
        return str(self.config["seed"])

    @property
    def label(self) -> Label:
        """Method, space and weight, as in the paper's table."""
        return label_of(self.config)

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted field -> value of all that makes a run what it is, but for its seed."""
        flat = flatten(without_what_is_off(self.config))
        return {k: v for k, v in flat.items() if k.split(".")[0] not in IGNORED}


def find_runs(paths: Sequence[epath.Path]) -> list[Run]:
    """The runs among some directories, and among the directories in them.

    Raises:
        RunError: nothing there, or a run that is not finished.
        FileError: a file that cannot be read.
    """
    found: list[epath.Path] = []
    for path in paths:
        if (path / "config.json").is_file():
            found.append(path)
            continue
        inside = sorted(p.parent for p in path.glob("*/config.json")) if path.is_dir() else []
        if not inside:
            raise RunError(f"{path} is no run directory (no config.json), and holds none.")
        found += inside
    return [read_run(path) for path in dict.fromkeys(found)]


def read_run(directory: epath.Path) -> Run:
    """One run.

    Raises:
        RunError: not finished.
        FileError: a file that cannot be read.
    """
    if not (directory / "eval.json").is_file():
        raise RunError(
            f"{directory} is not finished: it has no eval.json. Resume it with the command that "
            "trains it, or leave it out."
        )
    path = directory / "config.json"
    config = io.read_json(path)
    check_schema(config, path)
    numbers = current_names(io.read_json(directory / "eval.json"), list(config["encoders"]))
    run = Run(directory, config, numbers)
    try:
        _ = run.label, run.settings
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not the config of a run of this version: {error}") from None
    return run


def check_schema(config: Mapping[str, Any], path: epath.Path) -> None:
    """Refuses the config of a run that this version cannot read.

    Args:
        config: as in config.json.
        path: of the file, for the message.

    Raises:
        RunError: one of an earlier version, or one that lacks a section.
    """
    if "constraint" in config:
        raise RunError(
            f"{path} was written by an earlier version of pec_jax (config.constraint): read that "
            "run with the version that made it, or train it again."
        )
    whole = [n for n in SECTIONS if n == "seed" or isinstance(config.get(n), Mapping)]
    if missing := [n for n in SECTIONS if n not in config or n not in whole]:
        raise RunError(f"{path} lacks {', '.join(missing)}; it is not the config of a run.")


def current_names(numbers: Mapping[str, Any], encoders: Sequence[str]) -> dict[str, Any]:
    """The numbers of a run under the names that they have today.

    Distances were called after their encoder alone before `pairwise_l2_` said what they are.

    Args:
        numbers: as in eval.json.
        encoders: their names.
    """
    names = "|".join(map(re.escape, encoders))
    old = re.compile(rf"diversity/({names})(?=/|$)")
    return {old.sub(r"diversity/pairwise_l2_\1", name): value for name, value in numbers.items()}


def rows_of_runs(runs: Sequence[Run]) -> list[tuple[Row, list[Run]]]:
    """Rows in the order of the runs, after one of the base model; each with its runs.

    Raises:
        RunError: two runs of one config and seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    rows = [(_base_row(runs), list(runs))]
    names = _distinct_labels([group[0] for group in groups.values()])
    for label, group in zip(names, groups.values()):
        seeds = [run.seed for run in group]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            same = ", ".join(str(run.directory) for run in group if run.seed == twice)
            raise RunError(f"These are one config with one seed ({twice}): {same}. Give one.")
        rows.append((Row(*label, values=_values(group, "")), group))
    return rows


def _values(runs: Sequence[Run], prefix: str) -> dict[str, dict[str, float]]:
    columns = [
        name.removeprefix(prefix)
        for name in runs[0].evaluation
        if name.startswith(prefix) and is_column(name.removeprefix(prefix))
    ]
    values: dict[str, dict[str, float]] = {column: {} for column in columns}
    for run in runs:
        for column in columns:
            number = run.evaluation.get(prefix + column)
            if not isinstance(number, int | float):
                raise RunError(f"{run.directory / 'eval.json'} has no number {prefix + column}.")
            values[column][run.seed] = float(number)
    return values


def _base_row(runs: Sequence[Run]) -> Row:
    """The model before training. Runs of one seed measured it alike: one of them speaks."""
    first = {run.seed: run for run in reversed(runs)}
    ordered = list(dict.fromkeys(run.seed for run in runs))
    return Row(BASE, "", "", values=_values([first[seed] for seed in ordered], "base/"))


def _identity(run: Run) -> str:
    return json.dumps(run.settings, sort_keys=True)


def _distinct_labels(runs: Sequence[Run]) -> list[Label]:
    """The label of each config; where two are the same, what sets them apart is added."""
    labels = []
    for run in runs:
        twins = [other.settings for other in runs if other.label == run.label]
        differing = sorted(
            key
            for key in set().union(*twins)
            if len({json.dumps(twin.get(key)) for twin in twins}) > 1
        )
        label = run.label
        if differing:
            extra = ", ".join(f"{key}={run.settings.get(key, 'off')}" for key in differing)
            label = label._replace(method=f"{label.method} ({extra})")
        labels.append(label)
    return labels
