"""The paper's table: one row per method, one column per metric, normalised over the rows.

Each metric is scaled to 0..1 between the least and the greatest of the rows' means;
`quality/normalized_average` and `diversity/normalized_average` are the means over the metrics of
their kind, and `overall` is the mean of the two. The scale is common to all seeds, so that each
seed has its own three numbers, and each row an interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from pec_jax.errors import RunError
from pec_jax.evaluation.cells import csv_text, markdown

LABELS = ("method", "perceptual_space", "weight")
QUALITY, DIVERSITY, OVERALL = (
    "quality/normalized_average",
    "diversity/normalized_average",
    "overall",
)
COMPUTED = (QUALITY, DIVERSITY, OVERALL)
REPEATED = (
    "diversity/variance_",
    "diversity/pairwise_cos_",
    "diversity/pairwise_l2_pickscore",
    "diversity/pairwise_l2_imagereward",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One method: what it is called, and each metric's number for every seed.

    Attributes:
        method: name, as the paper has it.
        perceptual_space: "latent", an encoder, or "" for a method without one.
        weight: the method's own parameter, as typed; "" for none.
        values: metric -> {seed: number}.
    """

    method: str
    perceptual_space: str
    weight: str
    values: Mapping[str, Mapping[str, float]]

    @property
    def seeds(self) -> list[str]:
        """In the order in which they were read."""
        return list(next(iter(self.values.values())))

    @property
    def label(self) -> str:
        """Method, space and weight in one."""
        return " ".join(part for part in (self.method, self.perceptual_space, self.weight) if part)

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return float(np.mean(list(self.values[metric].values())))


class Interval(NamedTuple):
    """A mean over seeds and the half width of its 95% interval (nan for one seed)."""

    mean: float
    half: float


def is_column(name: str) -> bool:
    """Whether a number of an evaluation is a column of the table.

    Variances and cosines repeat the pairwise distances, and the paper takes these in DINO's and
    CLIP's space only.
    """
    return (
        name.startswith(("quality/", "diversity/"))
        and name not in COMPUTED
        and not name.endswith(("/low", "/high"))
        and not name.startswith(REPEATED)
    )


def student_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and half width of Student's t interval over seeds.

    Args:
        values: [S], one number per seed.
        level: of confidence.

    Returns:
        The half width is nan for fewer than 2 seeds.
    """
    array = np.asarray(values, np.float64)
    if array.size < 2:
        return Interval(float(array.mean()), math.nan)
    quantile = stats.t.ppf(0.5 + level / 2, array.size - 1)
    return Interval(
        float(array.mean()), float(quantile * array.std(ddof=1) / math.sqrt(array.size))
    )


def normalise(rows: Sequence[Row]) -> list[Row]:
    """The rows with the three computed columns added.

    Args:
        rows: with the same columns, at least one of quality and one of diversity.

    Returns:
        New rows. A metric that is the same in all rows counts 0 in every one of them.

    Raises:
        RunError: the columns differ, or one kind is missing.

    Source: arXiv 2605.12112, Table 1, which this reproduces to the digits it prints.
    """
    columns = _common_columns(rows)
    scaled: list[dict[str, dict[str, float]]] = [{} for _ in rows]
    for column in columns:
        means = [row.mean(column) for row in rows]
        low, span = min(means), max(means) - min(means)
        for row, target in zip(rows, scaled):
            target[column] = {
                seed: (value - low) / span if span > 0 else 0.0
                for seed, value in row.values[column].items()
            }
    result = []
    for row, numbers in zip(rows, scaled):
        extra: dict[str, dict[str, float]] = {name: {} for name in COMPUTED}
        for seed in row.seeds:
            for kind, name in (("quality/", QUALITY), ("diversity/", DIVERSITY)):
                extra[name][seed] = float(
                    np.mean([numbers[c][seed] for c in columns if c.startswith(kind)])
                )
            extra[OVERALL][seed] = (extra[QUALITY][seed] + extra[DIVERSITY][seed]) / 2
        result.append(dataclasses.replace(row, values={**row.values, **extra}))
    return result


def ratio(row: Row, other: Row, metric: str = OVERALL) -> Interval:
    """How many times `other`'s metric a row has, seed by seed.

    Args:
        row: normalised.
        other: likewise, with some seeds in common.
        metric: the column.

    Returns:
        Mean of the ratios over the common seeds, and the half width of its 95% interval.

    Raises:
        RunError: no seed in common.
    """
    common = [seed for seed in row.seeds if seed in other.values[metric]]
    if not common:
        raise RunError(f"{row.label!r} and {other.label!r} have no seed in common.")
    return student_interval([row.values[metric][s] / other.values[metric][s] for s in common])


def write_csv(rows: Sequence[Row]) -> str:
    """The table as csv: means, and `<metric>/low`, `<metric>/high` of the 95% interval."""
    columns = ordered_columns(rows)
    several = any(len(row.seeds) > 1 for row in rows)
    heading: list[object] = [*LABELS, "seeds"]
    for column in columns:
        heading += [column, f"{column}/low", f"{column}/high"] if several else [column]
    lines = [heading]
    for row in rows:
        cells: list[object] = [row.method, row.perceptual_space, row.weight, len(row.seeds)]
        for column in columns:
            mean, half = student_interval(list(row.values[column].values()))
            cells.append(f"{mean:.6g}")
            if several:
                known = not math.isnan(half)
                cells += [f"{mean - half:.6g}", f"{mean + half:.6g}"] if known else ["", ""]
        lines.append(cells)
    return csv_text(lines)


def write_markdown(rows: Sequence[Row], definitions: Mapping[str, str]) -> str:
    """The table as markdown, the best of a column bold and the second best underlined."""
    columns = ordered_columns(rows)
    ranks = {column: ranks_of([row.mean(column) for row in rows]) for column in columns}
    lines = [
        "| " + " | ".join([*LABELS, "seeds", *map(markdown, columns)]) + " |",
        "|" + "---|" * len(LABELS) + "---:|" * (len(columns) + 1),
    ]
    for index, row in enumerate(rows):
        cells = [markdown(text) for text in (row.method, row.perceptual_space, row.weight)]
        cells.append(str(len(row.seeds)))
        for column in columns:
            mean, half = student_interval(list(row.values[column].values()))
            text = format_number(mean) + ("" if math.isnan(half) else f" ± {half:.2g}")
            mark = {0: "**{}**", 1: "<u>{}</u>"}.get(ranks[column][index], "{}")
            cells.append(mark.format(text))
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- `{name}`: {text}" for name, text in definitions.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def format_number(value: float) -> str:
    """Four significant digits, without an exponent."""
    digits = 3 if abs(value) < 10 else 2
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.000


def describe(columns: Sequence[str]) -> dict[str, str]:
    """What each column of a table means, in one line."""
    found = {}
    for column in columns:
        kind, _, name = column.partition("/")
        if column in _DEFINITIONS:
            found[column] = _DEFINITIONS[column]
        elif kind == "quality":
            found[column] = f"mean of the reward `{name}` over all images"
        elif name.startswith("failures"):
            found[column] = f"share of the images that the reward `{name}` could not judge"
        else:
            found[column] = _of_space(name)
    return found


def _of_space(name: str) -> str:
    """What a diversity is, from its measure and its encoder."""
    for prefix, text in _MEASURES.items():
        if name.startswith(prefix):
            return text.format(name.removeprefix(prefix))
    return f"diversity of a prompt's images in {name}'s space"


_MEASURES = {
    "pairwise_l2_": "mean Euclidean distance of two images of a prompt, raw features of {}",
    "pairwise_cos_": "mean of 1 - cosine of two images of a prompt, features of {}",
    "vendi_": "Vendi score of a prompt's images, cosine kernel, features of {}",
    "variance_": "variance of a prompt's images, unit features of {}",
}
_DEFINITIONS = {
    "quality/finish": "how well made the images are, by the rules of the embedded world",
    "diversity/attributes": "entropy of what a prompt leaves open, over its maximum",
    QUALITY: "mean over the quality metrics, each scaled to 0..1 over the rows",
    DIVERSITY: "the same over the diversity metrics",
    OVERALL: "mean of the two averages",
}


def ordered_columns(rows: Sequence[Row]) -> list[str]:
    """Quality, its average, diversity, its average, overall."""
    names = list(rows[0].values)
    plain = [name for name in names if name not in COMPUTED]
    quality = sorted(name for name in plain if name.startswith("quality/"))
    diversity = sorted(name for name in plain if name.startswith("diversity/"))
    return [*quality, QUALITY, *diversity, DIVERSITY, OVERALL]


def ranks_of(means: Sequence[float]) -> list[int]:
    """0 for the best of a column, 1 for the second best, and so on; equals share a rank."""
    order = sorted(set(means), reverse=True)
    return [order.index(value) for value in means]


def _common_columns(rows: Sequence[Row]) -> list[str]:
    if not rows:
        raise RunError("There are no rows: give at least one finished run or a csv with lines.")
    columns = [name for name in rows[0].values if is_column(name)]
    for row in rows:
        other = {name for name in row.values if is_column(name)}
        if other != set(columns):
            differing = ", ".join(sorted(other ^ set(columns)))
            raise RunError(
                f"{row.label!r} and {rows[0].label!r} were not measured alike; they differ in "
                f"{differing}. Evaluate both with the same config.rewards and config.encoders."
            )
    for kind in ("quality/", "diversity/"):
        if not any(name.startswith(kind) for name in columns):
            raise RunError(f"There is no column named {kind}*, so there is nothing to average.")
    return columns
