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
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|called_computations|branch_computations)="
    r"\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)\}?"
)
_NAME = re.compile(r"%?([\w.\-]+)")


class Collective(NamedTuple):
    """How often a kind of collective runs in one step, and the bytes of its results on a chip."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nothing here needs
    bytes: int


class _Line(NamedTuple):
    kind: str  # of a collective, or ""
    bytes: int
    channel: str  # one a collective; the parts of an asynchronous one share it
    called: tuple[str, ...]  # computations
    condition: str  # of a while loop, or ""
    times: int  # that a loop is known to run; 0 is unknown


class _Computation(NamedTuple):
    lines: list[_Line]
    limits: list[int]  # constants that a loop's counter may be compared with


def collectives(hlo: str) -> dict[str, Collective]:
    """The collectives of one step.

    Args:
      hlo: text of a compiled module, as `compiled.as_text()` gives it.

    Returns:
      Kind -> how often it runs and the bytes that one chip has in hand after it. Loops count as
      often as they run: as the compiler says, or else as the constant says that a counter from 0 is
      compared with, the form in which TPU programs have `lax.scan`. Another loop counts once.
    """
    computations, entry = _parse(hlo)
    totals = dict.fromkeys(KINDS, Collective(0, 0))
    for kind, size, times in _run(computations, entry, 1, set()):
        before = totals[kind]
        totals[kind] = Collective(before.count + times, before.bytes + size * times)
    return {kind: total for kind, total in totals.items() if total.count}


def _run(
    computations: dict[str, _Computation], name: str, times: int, seen: set[str]
) -> Iterator[tuple[str, int, int]]:
    """(kind, bytes, times) of each collective; `seen` are the channels of this turn of a loop."""
    for line in computations[name].lines if name in computations else ():
        if line.kind and line.channel not in seen:
            seen |= {line.channel} - {""}
            yield line.kind, line.bytes, times
        loop = bool(line.condition)
        turns = line.times or _limit(computations, line.condition)
        for called in line.called:
            yield from _run(computations, called, times * turns, set() if loop else seen)


def _limit(computations: dict[str, _Computation], condition: str) -> int:
    limits = computations[condition].limits if condition in computations else []
    return limits[0] if len(limits) == 1 else 1


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = "", ""
    for text in hlo.splitlines():
        # A kernel's text may go over several lines, which are no headers.
        if start := _COMPUTATION.match(text):
            current = start.group(1)
            computations[current] = _Computation([], [])
            entry = current if text.startswith("ENTRY") else entry
        elif current not in computations:
            continue
        elif limit := _LIMIT.search(text):
            computations[current].limits.append(int(limit.group(1)))
        elif (found := _INSTRUCTION.match(text)) and (line := _line(text, *found.groups())):
            computations[current].lines.append(line)
    return computations, entry


def _line(text: str, result: str, operation: str) -> _Line | None:
    kind = operation.removesuffix("-start")
    if kind in KINDS:
        # The tuple of an asynchronous start holds operands and results: the last shape is the
        # result's, but for all-reduce and permutes, where both are alike.
        shapes = _SHAPE.findall(result)
        if operation.endswith("-start"):
            shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
        channel = _CHANNEL.search(text)
        return _Line(kind, sum(map(_size, shapes)), channel.group(1) if channel else "", (), "", 1)
    if operation in ("while", "call", "conditional", "fusion", "async-start"):
        trips, condition = _TRIPS.search(text), _CONDITION.search(text)
        loop = operation == "while"
        called = tuple(
            name for names in _CALLED.findall(text) for name in _NAME.findall(names) if name
        )
        times = int(trips.group(1)) if loop and trips else int(not loop)
        return _Line("", 0, "", called, condition.group(1) if loop and condition else "", times)
    return None


def _size(shape: tuple[str, str]) -> int:
    dtype, dims = shape
    return _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
