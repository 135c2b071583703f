"""Who wins, and by how much, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pec_jax.config.registry import OBJECTIVES
from pec_jax.evaluation.run_table import BASE
from pec_jax.evaluation.table import OVERALL, Row, ratio, student_interval


class Leaders(NamedTuple):
    """The rows that a reader wants to see first; None where there is no such row."""

    base: Row | None  # the model before training
    baseline: Row | None  # an objective alone, without any constraint
    best: Row | None  # of those that were trained, the one with the greatest `overall`


def leaders(rows: Sequence[Row]) -> Leaders:
    """Finds them among normalised rows."""
    alone = [OBJECTIVES[name].label for name in OBJECTIVES]
    trained = by_overall([row for row in rows if row.method != BASE])
    return Leaders(
        base=next((row for row in rows if row.method == BASE), None),
        baseline=next((row for label in alone for row in trained if row.label == label), None),
        best=trained[0] if trained else None,
    )


def by_overall(rows: Sequence[Row]) -> list[Row]:
    """Normalised rows, the best first."""
    return sorted(rows, key=lambda row: -row.mean(OVERALL))


def verdict(rows: Sequence[Row]) -> str:
    """The sentence a report begins with.

    Args:
        rows: normalised.
    """
    base, baseline, best = leaders(rows)
    if best is None:
        return "Only the base model is here: nothing to compare it with."
    others = by_overall([row for row in rows if row is not best and row.method != BASE])
    sentences = [f"{best.label} has the greatest overall score, {best.mean(OVERALL):.2f}"]
    if baseline is not None and baseline is not best:
        sentences[0] += f", {_times(best, baseline)}"
    sentences[0] += "."
    if others and others[0] is not baseline:
        after = others[0]
        apart = "" if _told_apart(best, after) else ", which these seeds do not tell apart from it"
        sentences.append(f"Next is {after.label} with {after.mean(OVERALL):.2f}{apart}.")
    if base is not None and base.mean(OVERALL) >= best.mean(OVERALL):
        sentences.append(f"The base model itself has {base.mean(OVERALL):.2f}.")
    return " ".join(sentences)


def _times(best: Row, other: Row) -> str:
    """How many times another's score the best has, with what the seeds say of that."""
    common = set(best.seeds) & set(other.seeds)
    if min(other.values[OVERALL].values()) <= 0:
        return f"{best.mean(OVERALL) - other.mean(OVERALL):.2f} more than {other.label}"
    if len(common) < 2:
        times = best.mean(OVERALL) / other.mean(OVERALL)
        return f"{times:.2f} times that of {other.label} (one seed, so no interval)"
    mean, half = ratio(best, other)
    sure = "" if mean - half > 1 else ", which they do not tell from 1"
    return (
        f"{mean:.2f} ± {half:.2f} times that of {other.label} "
        f"(95% interval over {len(common)} seeds{sure})"
    )


def _told_apart(best: Row, other: Row) -> bool:
    """Whether the 95% interval of their difference, seed by seed, is above 0."""
    common = [seed for seed in best.seeds if seed in other.values[OVERALL]]
    pairs = [best.values[OVERALL][seed] - other.values[OVERALL][seed] for seed in common]
    if len(pairs) < 2:
        return False
    mean, half = student_interval(pairs)
    return mean - half > 0
