"""Rows from a csv file, and what a csv that a person has typed may have wrong."""

from __future__ import annotations

import pytest

from pec_jax.errors import RunError
from pec_jax.evaluation import csv_rows, table
from pec_jax.evaluation.csv_rows import rows_from_csv

HEADING = "method,quality/a,diversity/b\n"


def write(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_csv_with_seeds_makes_one_row(tmp_path):
    path = write(tmp_path, "method,seed,quality/a,diversity/b\nx,0,1,2\nx,1,3,4\ny,0,5,6\n")
    rows = rows_from_csv(path)
    assert [r.method for r in rows] == ["x", "y"]
    assert rows[0].values["quality/a"] == {"0": 1.0, "1": 3.0}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_ends_of_lines_and_a_byte_order_mark(tmp_path, end):
    text = "\ufeffmethod,quality/a,diversity/b,,\nx,1,2,,\n\ny,3,4,,\n".replace("\n", end)
    rows = rows_from_csv(write(tmp_path, text))
    assert [(r.method, r.mean("diversity/b")) for r in rows] == [("x", 2.0), ("y", 4.0)]


def test_a_label_is_one_line_of_what_can_be_shown(tmp_path):
    rows = rows_from_csv(write(tmp_path, HEADING + '"two\nlines\t of\x1b[31m it",1,2\n'))
    assert rows[0].label == "two lines of\N{REPLACEMENT CHARACTER}[31m it"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "column `method`"),
        ("a,b\n1,2\n", "column `method`"),
        ("method;quality/a;diversity/b\nx;1;2\n", "separated by commas; it has: method;quality/a"),
        ("method,quality/a\n", "no rows"),
        (HEADING + "x,1,oops\n", "line 2: diversity/b is 'oops'"),
        (HEADING + "x,1,nan\n", "not a finite number"),
        (HEADING + "x,1\n", "diversity/b is missing, not a finite number"),
        (HEADING + "x,1,2\nx,1,2\n", "line 3: a second line of 'x'"),
        (HEADING + "x,1,1e308\n", r"line 2: diversity/b is 1e\+308; at most 1e\+30"),
        (HEADING + "x,-1e31,1\n", r"quality/a is -1e\+31"),
        (HEADING + "PEC, dino,1,2\n", "line 2: has more cells than the heading.*double quotes"),
        (HEADING + "x" * 131_073 + ",1,2\n", r"line 2: cannot be read as csv \(field larger"),
        (HEADING + 'x,1,2\n"y,1,2\n' + "z,1,2\n" * 30_000, "double quote that is not closed"),
        (HEADING + "x" * 201 + ",1,2\n", "line 2: method has 201 characters; at most 200"),
        ("method,quality/a,quality/a,diversity/b\nx,1,2,3\n", "column quality/a twice"),
        ("method,method,quality/a,diversity/b\nx,y,2,3\n", "column method twice"),
        ("method,quality/<b>,diversity/b\nx,1,2\n", "the column 'quality/<b>' must be called"),
        ("method,quality/a|b,diversity/b\nx,1,2\n", "none of"),
        ('method,"quality/\na",diversity/b\nx,1,2\n', "in one line"),
        ("method,quality/a\nx,1\n", r"no column named diversity/\*"),
        (HEADING.encode("utf-16"), "is UTF-16, not UTF-8. Convert it: iconv -f UTF-16"),
        (HEADING.encode() + b"caf\xe9,1,2\n", "not UTF-8.*iconv -f CP1252 -t UTF-8 t.csv"),
    ],
)
def test_a_bad_csv_is_answered_with_a_sentence(tmp_path, text, words):
    with pytest.raises(RunError, match=words):
        table.normalise(rows_from_csv(write(tmp_path, text)))


def test_a_missing_or_huge_csv_is_answered_with_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="cannot read"):
        rows_from_csv(tmp_path / "none.csv")
    path = write(tmp_path, HEADING + "".join(f"m{i},{i},{i}\n" for i in range(1001)))
    with pytest.raises(RunError, match="has 1001 rows; at most 1000"):
        rows_from_csv(path)
    monkeypatch.setattr(csv_rows, "MAX_BYTES", 3)
    with pytest.raises(RunError, match="at most 3"):
        rows_from_csv(path)


def test_the_largest_numbers_stay_finite(tmp_path):
    path = write(tmp_path, HEADING + "x,1e30,-1e30\ny,-1e30,1e30\nz,0,0\n")
    rows = table.normalise(rows_from_csv(path))
    assert [r.mean("overall") for r in rows] == pytest.approx([0.5] * 3)
