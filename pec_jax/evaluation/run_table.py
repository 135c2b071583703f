"""Rows of the table from run directories: one row a config, one value a seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from pec_jax import io
from pec_jax.errors import RunError
from pec_jax.evaluation.table import Row, is_column

METHODS = {
    "none": "Flow-GRPO",
    "kl": "Flow-GRPO w/ KL",
    "clip_higher": "Clip-Higher",
    "entropy_reg": "Entropy Reg.",
    "clip_cov": "Clip-Cov",
    "kl_cov": "KL-Cov",
    "pec": "PEC",
    "pcvae": "PCVAE",
    "pec_target": "PEC (target)",
}
BASE = "Base"
WITHOUT_SPACE = ("none", "kl", "clip_higher")
# The field of config.constraint that is a method's own parameter; the others have `weight`.
PARAMETER = {
    "none": "",
    "clip_higher": "clip_ratio",
    "clip_cov": "cov_share",
    "pec_target": "target",
}
# Where a run differs from another in one of these alone, the two are still one row.
IGNORED = ("seed", "schedule", "mesh")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its directory, its flat config and its final evaluation."""

    directory: epath.Path
    config: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    @property
    def seed(self) -> str:
        """As typed."""
        return str(self.config["seed"])

    @property
    def label(self) -> tuple[str, str, str]:
        """Method, space and weight, as in the paper's table."""
        name = self.config["constraint.name"]
        space = ""
        if name not in WITHOUT_SPACE:
            latent = self.config.get("constraint.space") == "latent"
            space = "latent" if latent else self.config["perception.encoder"]
        field = PARAMETER.get(name, "weight")
        weight = f"{self.config[f'constraint.{field}']:g}" if field else ""
        return METHODS.get(name, name), space, weight


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
            f"{directory} is not finished: it has no eval.json. Give the command that trains it "
            "once more, or leave it out."
        )
    config = _flatten(io.read_json(directory / "config.json"))
    missing = [name for name in ("seed", "constraint.name") if name not in config]
    if missing:
        raise RunError(f"{directory / 'config.json'} lacks {', '.join(missing)}.")
    return Run(directory, config, io.read_json(directory / "eval.json"))


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
    kept = {k: v for k, v in run.config.items() if k.split(".")[0] not in IGNORED}
    return json.dumps(kept, sort_keys=True)


def _distinct_labels(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """The label of each config; where two are the same, what sets them apart is added."""
    labels = []
    for run in runs:
        twins = [other for other in runs if other.label == run.label]
        method, space, weight = run.label
        differing = sorted(
            key
            for key in set().union(*(twin.config for twin in twins))
            if key.split(".")[0] not in IGNORED
            and len({json.dumps(twin.config.get(key)) for twin in twins}) > 1
        )
        if differing:
            extra = ", ".join(f"{key}={run.config.get(key)}" for key in differing)
            method = f"{method} ({extra})"
        labels.append((method, space, weight))
    return labels


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
