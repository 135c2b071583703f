"""Rows of the table from a csv file, such as one that a person has typed."""

from __future__ import annotations

import csv
import io as text_io
import math
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from pec_jax import io
from pec_jax.errors import RunError
from pec_jax.evaluation.cells import one_line
from pec_jax.evaluation.table import LABELS, Row, is_column

MAX_BYTES = 10_000_000
MAX_ROWS = 1000  # each has a point and a line of the legend
MAX_LABEL_CHARS = 200
MAX_NUMBER = 1e30  # far from where sums and differences overflow
_UNFIT = "`|<>"  # for the name of a column, which is written as code


def rows_from_csv(path: epath.Path) -> list[Row]:
    """Rows of a csv with the columns method, perceptual_space, weight and the metrics.

    A column `seed` makes several lines of one label one row; without it each line is a row. The
    three computed columns are skipped.

    Raises:
        RunError: the file is missing or too large, has no such columns or one of them twice, a
            line does not fit the heading, a label is too long, or a cell is no number.
    """
    lines = _lines(path)
    heading = next(lines, (1, []))[1]
    columns = _columns(path, heading)
    collected: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for number, cells in lines:
        if any(cells[len(heading) :]):
            raise RunError(
                f"{path}, line {number}: has more cells than the heading. A text with a comma must "
                "stand in double quotes."
            )
        line = dict(zip(heading, cells))
        label = _label(path, number, line)
        seed = line.get("seed", "").strip()
        values = collected.setdefault(label, {column: {} for column in columns})
        if seed in values[columns[0]]:
            raise RunError(f"{path}, line {number}: a second line of {' '.join(label).strip()!r}.")
        for column in columns:
            values[column][seed] = _number(line.get(column), path, number, column)
    if not collected:
        raise RunError(f"{path} has no rows under its heading.")
    if len(collected) > MAX_ROWS:
        raise RunError(f"{path} has {len(collected)} rows; at most {MAX_ROWS} are compared.")
    return [
        Row(method, space, weight, values) for (method, space, weight), values in collected.items()
    ]


def _lines(path: epath.Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of its last line in the file, cells) of what is not blank."""
    reader = csv.reader(text_io.StringIO(_read_bounded(path), newline=""))
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise RunError(
            f"{path}, line {reader.line_num}: cannot be read as csv ({error}). Is there a double "
            "quote that is not closed?"
        ) from None


def _columns(path: epath.Path, heading: Sequence[str]) -> list[str]:
    """The metrics of a heading."""
    columns = [name for name in heading if is_column(name)]
    if "method" not in heading or not columns:
        raise RunError(
            f"{path} needs a column `method` and columns named quality/* and diversity/*, "
            f"separated by commas; it has: {one_line(', '.join(heading))[:500] or 'none'}."
        )
    for name in (*LABELS, "seed", *columns):
        if heading.count(name) > 1:
            raise RunError(f"{path} has the column {name} twice: leave one.")
    for name in columns:
        if len(name) > MAX_LABEL_CHARS or one_line(name) != name or set(name) & set(_UNFIT):
            raise RunError(
                f"{path}: the column {name[:MAX_LABEL_CHARS]!r} must be called otherwise: at most "
                f"{MAX_LABEL_CHARS} characters in one line, and none of {' '.join(_UNFIT)}."
            )
    return columns


def _label(path: epath.Path, number: int, line: Mapping[str, str]) -> tuple[str, str, str]:
    """Method, space and weight of a line."""
    method, space, weight = (one_line(line.get(name, "")) for name in LABELS)
    for name, text in zip(LABELS, (method, space, weight)):
        if len(text) > MAX_LABEL_CHARS:
            raise RunError(
                f"{path}, line {number}: {name} has {len(text)} characters; at most "
                f"{MAX_LABEL_CHARS} are shown."
            )
    return method, space, weight


def _read_bounded(path: epath.Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from None
    if len(data) > MAX_BYTES:
        raise RunError(f"{path} is too large; a table of at most {MAX_BYTES} bytes is read.")
    other = io.other_encoding(data[: io.TOLD_BYTES])
    try:
        if other is None:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    raise RunError(
        f"{path} is {other or 'some encoding'}, not UTF-8. {io.recode_advice(path, other)}"
    )


def _number(cell: str | None, path: epath.Path, line: int, column: str) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        shown = "missing" if cell is None else repr(cell[:MAX_LABEL_CHARS])
        raise RunError(f"{path}, line {line}: {column} is {shown}, not a finite number.")
    if abs(value) > MAX_NUMBER:
        raise RunError(
            f"{path}, line {line}: {column} is {value:g}; at most {MAX_NUMBER:g} is compared."
        )
    return value
