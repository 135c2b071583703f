"""What `pec_jax.score` writes: a row per image, and a summary with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pec_jax import io
from pec_jax.evaluation import summary, table
from pec_jax.evaluation.cells import csv_text, markdown
from pec_jax.evaluation.image_sets import ImageSet
from pec_jax.evaluation.scoring import Scores


def write(image_set: ImageSet, scores: Scores, out: Path) -> dict[str, float]:
    """Writes scores.csv, summary.csv and summary.md.

    Returns:
        The summary: name -> number, with `<name>/low` and `<name>/high`.
    """
    numbers = summarise(image_set, scores)
    io.write_text(out / "scores.csv", images_csv(image_set, scores))
    io.write_text(out / "summary.csv", summary_csv(numbers))
    io.write_text(out / "summary.md", summary_markdown(numbers, image_set))
    return numbers


def summarise(image_set: ImageSet, scores: Scores) -> dict[str, float]:
    """Means over prompts and their intervals, as of `summary.summarise`, of groups of any size.

    A prompt with a single image has no diversity.
    """
    collected: dict[str, list[float]] = {}
    for members in image_set.members():
        rewards = {label: values[None, members] for label, values in scores.rewards.items()}
        features = {label: values[None, members] for label, values in scores.features.items()}
        found = summary.per_prompt(rewards, features if len(members) > 1 else {}, {})
        for name, value in found.items():
            collected.setdefault(name, []).append(float(value[0]))
    numbers = {name: np.asarray(values) for name, values in collected.items()}
    numbers |= {f"diversity/{name}": values for name, values in scores.diversities.items()}
    return summary.intervals(numbers) | summary.failures(scores.rewards)


def images_csv(image_set: ImageSet, scores: Scores) -> str:
    """file, prompt, and a column per reward; empty where an image could not be judged."""
    labels = list(scores.rewards)
    rows: list[Sequence[object]] = [["file", "prompt", *labels]]
    for i, (file, prompt) in enumerate(zip(image_set.files, image_set.prompts)):
        values = [scores.rewards[label][i] for label in labels]
        cells = [f"{value:.7g}" if np.isfinite(value) else "" for value in values]
        rows.append([file, prompt.text, *cells])
    return csv_text(rows)


def summary_csv(numbers: dict[str, float]) -> str:
    """metric, value, low, high."""
    rows: list[Sequence[object]] = [["metric", "value", "low", "high"]]
    for name in _names(numbers):
        ends = [numbers.get(f"{name}/{end}") for end in ("low", "high")]
        cells = ["" if value is None else f"{value:.7g}" for value in (numbers[name], *ends)]
        rows.append([name, *cells])
    return csv_text(rows)


def summary_markdown(numbers: dict[str, float], image_set: ImageSet) -> str:
    """The same with a definition of each metric."""
    sizes = sorted({len(members) for members in image_set.members()})
    count = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    lines = [
        f"{len(image_set)} images of {len(image_set.members())} prompts, {count} per prompt. "
        "Means over prompts; intervals are 95% bootstrap intervals over prompts.",
        "",
        "| metric | value | 95% interval |",
        "|---|---:|---:|",
    ]
    for name in _names(numbers):
        low, high = (numbers.get(f"{name}/{end}") for end in ("low", "high"))
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        lines.append(f"| {markdown(name)} | {numbers[name]:.4g} | {interval} |")
    columns = [name for name in _names(numbers) if not name.startswith("failures/")]
    notes = [f"- `{name}`: {text}" for name, text in table.describe(columns).items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def _names(numbers: dict[str, float]) -> list[str]:
    return sorted(name for name in numbers if not name.endswith(("/low", "/high")))
