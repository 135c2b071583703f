"""The collectives of a compiled program, read from its HLO text, loops times their length."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
    "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([\w\-]+)\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"(?:body|to_apply|calls|called_computations|branch_computations)="
    r"\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)\}?"
)
_NAME = re.compile(r"%?([\w.\-]+)")


class Collective(NamedTuple):
    """How often a kind of collective runs in one step, and the bytes of its results on a chip."""

    count: int
    bytes: int


class _Line(NamedTuple):
    kind: str  # of a collective, or ""
    bytes: int
    called: tuple[str, ...]  # computations
    times: int


def collectives(hlo: str) -> dict[str, Collective]:
    """The collectives of one step.

    Args:
      hlo: text of a compiled module, as `compiled.as_text()` gives it.

    Returns:
      Kind -> how often it runs and the bytes that one chip has in hand after it. Loops count as
      often as the compiler knows them to run; one whose length it does not know counts once.
    """
    computations, entry = _parse(hlo)
    totals = dict.fromkeys(KINDS, Collective(0, 0))
    for kind, size, times in _run(computations, entry, 1):
        before = totals[kind]
        totals[kind] = Collective(before.count + times, before.bytes + size * times)
    return {kind: total for kind, total in totals.items() if total.count}


def _run(
    computations: dict[str, list[_Line]], name: str, times: int
) -> Iterator[tuple[str, int, int]]:
    for line in computations.get(name, ()):
        if line.kind:
            yield line.kind, line.bytes, times
        for called in line.called:
            yield from _run(computations, called, times * line.times)


def _parse(hlo: str) -> tuple[dict[str, list[_Line]], str]:
    computations: dict[str, list[_Line]] = {}
    current, entry = "", ""
    for text in hlo.splitlines():
        if text and not text.startswith(" "):
            start = _COMPUTATION.match(text)
            current = start.group(1) if start else ""
            computations.setdefault(current, [])
            entry = current if text.startswith("ENTRY") else entry
        elif (found := _INSTRUCTION.match(text)) and (line := _line(text, *found.groups())):
            computations[current].append(line)
    return computations, entry


def _line(text: str, result: str, operation: str) -> _Line | None:
    kind = operation.removesuffix("-start")
    if kind in KINDS:
        # The tuple of an asynchronous start holds operands and results: the last shape is the
        # result's, but for all-reduce and permutes, where both are alike.
        shapes = _SHAPE.findall(result)
        if operation.endswith("-start"):
            shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
        return _Line(kind, sum(map(_size, shapes)), (), 1)
    if operation in ("while", "call", "conditional", "fusion", "async-start"):
        trips = _TRIPS.search(text) if operation == "while" else None
        called = tuple(
            name for names in _CALLED.findall(text) for name in _NAME.findall(names) if name
        )
        return _Line("", 0, called, int(trips.group(1)) if trips else 1)
    return None


def _size(shape: tuple[str, str]) -> int:
    dtype, dims = shape
    return _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
