"""The table: the paper's computed columns from its raw ones, intervals, ranks, bad files."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest

from pec_jax.errors import RunError
from pec_jax.evaluation import table
from pec_jax.evaluation.csv_rows import rows_from_csv
from pec_jax.evaluation.table import COMPUTED, DIVERSITY, OVERALL, QUALITY, Row

PAPER = Path(__file__).with_name("paper_table1.csv")  # arXiv 2605.12112, Table 1, as printed


def row(name, quality, diversity, seeds="012", spread=0.0):
    def per_seed(value):
        return {seed: value + spread * (i - 1) for i, seed in enumerate(seeds)}

    values = {"quality/a": per_seed(quality), "diversity/b": per_seed(diversity)}
    return Row(name, "", "", values)


def test_the_papers_computed_columns_come_out():
    rows = table.normalise(rows_from_csv(PAPER))
    with PAPER.open(encoding="utf-8") as file:
        printed = list(csv.DictReader(file))
    assert len(rows) == len(printed) == 18
    for ours, theirs in zip(rows, printed):
        assert ours.method == theirs["method"]
        for column in COMPUTED:
            # The paper prints three digits.
            assert ours.mean(column) == pytest.approx(float(theirs[column]), abs=5e-4)


def test_normalisation_runs_from_0_to_1_on_the_rows_means():
    low, mid, high = table.normalise([row("a", 1, 30), row("b", 2, 10), row("c", 3, 20)])
    assert [r.mean(QUALITY) for r in (low, mid, high)] == pytest.approx([0, 0.5, 1])
    assert [r.mean(DIVERSITY) for r in (low, mid, high)] == pytest.approx([1, 0, 0.5])
    assert [r.mean(OVERALL) for r in (low, mid, high)] == pytest.approx([0.5, 0.25, 0.75])


def test_each_seed_is_placed_on_the_common_scale():
    rows = table.normalise([row("a", 0, 0), row("b", 1, 1, spread=0.1)])
    assert list(rows[1].values[OVERALL].values()) == pytest.approx([0.9, 1.0, 1.1])
    assert rows[1].mean(OVERALL) == pytest.approx(1.0)


def test_a_metric_without_variation_counts_nothing():
    rows = table.normalise([row("a", 5, 1), row("b", 5, 2)])
    assert [r.mean(QUALITY) for r in rows] == [0.0, 0.0]


def test_the_interval_is_students():
    value = table.student_interval([1.0, 2.0, 3.0])
    assert value.mean == pytest.approx(2.0)
    assert value.half == pytest.approx(4.302652729 / math.sqrt(3), rel=1e-8)  # t(0.975, 2)
    assert math.isnan(table.student_interval([1.0]).half)


def test_the_ratio_is_taken_seed_by_seed():
    a, b, _ = table.normalise([row("a", 3, 3, "01"), row("b", 2, 2, "12"), row("c", 0, 0)])
    value = table.ratio(a, b)
    assert value.mean == pytest.approx(a.values[OVERALL]["1"] / b.values[OVERALL]["1"])
    lonely = row("d", 1, 1, "9")
    with pytest.raises(RunError, match="no seed in common"):
        table.ratio(table.normalise([lonely, row("e", 2, 2, "9")])[0], a)


def test_best_and_second_best_are_marked():
    rows = table.normalise([row("a", 1, 3), row("b", 2, 2), row("c", 3, 1)])
    text = table.write_markdown(rows, table.describe(table.ordered_columns(rows)))
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    column = cells[0].index("quality/a")
    assert [line[column][:3] for line in cells[2:]] == ["1.0", "<u>", "**3"]
    assert "`overall`: mean of the two averages" in text


def test_the_csv_holds_means_and_intervals_and_reads_back():
    rows = table.normalise([row("a", 1, 3, spread=0.1), row("b", 2, 2)])
    text = table.write_csv(rows)
    line = next(csv.DictReader(io.StringIO(text)))
    half = table.student_interval(list(rows[0].values["quality/a"].values())).half
    assert float(line["quality/a/high"]) - float(line["quality/a"]) == pytest.approx(half, rel=1e-4)
    assert line["seeds"] == "3"


def test_labels_are_text_and_nothing_else():
    """No formula of a spreadsheet, no HTML, no markup, no end of a cell."""
    names = ["=cmd|' /C calc'!A0", "<script>alert(1)</script>", "a|b", "two\nlines", "**x** `y`"]
    rows = table.normalise([row(name, i, -i) for i, name in enumerate(names)])
    lines = list(csv.reader(io.StringIO(table.write_csv(rows))))[1:]
    assert [line[0] for line in lines] == ["'" + names[0], *names[1:]]
    text = table.write_markdown(rows, {})
    assert [line.split(" | ")[0] for line in text.splitlines()[2:7]] == [
        r"| =cmd\|' /C calc'!A0",
        r"| &lt;script&gt;alert(1)&lt;/script&gt;",
        r"| a\|b",
        r"| two lines",
        r"| \*\*x\*\* \`y\`",
    ]


def test_rows_measured_differently_are_refused():
    other = Row("z", "", "", {"quality/other": {"0": 1.0}, "diversity/b": {"0": 1.0}})
    with pytest.raises(RunError, match="quality/a, quality/other"):
        table.normalise([row("a", 1, 1), other])


def test_columns_are_the_papers():
    names = ["quality/x", "diversity/pairwise_l2_dino", "diversity/vendi_dino"]
    assert all(map(table.is_column, names))
    others = [
        "quality/x/low",
        "diversity/variance_dino",
        "diversity/pairwise_l2_pickscore",
        *COMPUTED,
        "seed",
    ]
    assert not any(map(table.is_column, others))


def test_equal_values_share_a_rank():
    assert table.ranks_of([1.0, 3.0, 3.0, 2.0]) == [2, 0, 0, 1]
    assert np.all(np.array(table.ranks_of([1.0, 1.0])) == 0)
