"""The sentence a report begins with, on rows whose answer is known."""

from __future__ import annotations

import dataclasses

import pytest

from pec_jax.evaluation import table
from pec_jax.evaluation.table import OVERALL
from pec_jax.evaluation.verdict import by_overall, leaders, verdict
from tests.evaluation.test_table import row


def rows(**overall):
    """Rows with these numbers of `overall`, one per seed."""
    made = []
    for name, values in overall.items():
        numbers = {str(seed): value for seed, value in enumerate(values)}
        label = {"Grpo": "Flow-GRPO"}.get(name, name)
        made.append(table.Row(label, "", "", {OVERALL: numbers}))
    return made


def test_the_best_and_the_baseline_seed_by_seed():
    said = verdict(rows(Base=[0.1, 0.1], Grpo=[0.4, 0.5], Mine=[0.8, 1.0], Other=[0.2, 0.2]))
    assert said == (
        "Mine has the greatest overall score, 0.90, 2.00 ± 0.00 times that of Flow-GRPO "
        "(95% interval over 2 seeds)."
    )


def test_a_difference_that_seeds_do_not_tell_is_said():
    said = verdict(rows(Grpo=[0.5, 0.6], Mine=[0.7, 0.5], Next=[0.58, 0.6]))
    assert "times that of Flow-GRPO (95% interval over 2 seeds, which they do not tell" in said
    assert said.endswith("Next is Next with 0.59, which these seeds do not tell apart from it.")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"Base": [0.5]}, "Only the base model"),
        ({"Base": [0.9], "Mine": [0.5]}, "0.50. The base model itself has 0.90."),
        ({"Grpo": [0.5], "Mine": [1.0]}, "2.00 times that of Flow-GRPO (one seed, so no interval)"),
        ({"Grpo": [0.0, 0.1], "Mine": [1.0, 1.0]}, "0.95 more than Flow-GRPO"),
        ({"Grpo": [0.9, 0.9], "Mine": [0.5, 0.5]}, "score, 0.90. Next is Mine with 0.50."),
        ({"A": [0.9, 0.9], "B": [0.5, 0.5]}, "A has the greatest overall score, 0.90. Next is B"),
    ],
)
def test_what_there_is_decides_what_is_said(made, words):
    assert words in verdict(rows(**made))


def test_the_leaders_of_normalised_rows():
    made = table.normalise([row("Base", 0, 3), row("Flow-GRPO", 3, 0), row("PEC", 3, 2)])
    found = leaders(made)
    assert [r.method for r in (found.base, found.baseline, found.best)] == [
        "Base",
        "Flow-GRPO",
        "PEC",
    ]
    assert by_overall(made)[0].method == "PEC"
    with_constraint = dataclasses.replace(made[1], perceptual_space="dino")
    assert leaders([made[0], with_constraint]).baseline is None
