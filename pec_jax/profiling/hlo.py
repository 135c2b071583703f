"""A compiled program as its HLO text has it: instructions, and how often each of them runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([\w\-]+)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|called_computations|branch_computations)="
    r"\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)\}?"
)
_NAME = re.compile(r"%?([\w.\-]+)")
_CALLERS = ("while", "call", "conditional", "fusion", "async-start")


class Instruction(NamedTuple):
    """One line.

    Attributes:
      result: type of what it gives.
      operation: e.g. "fusion".
      text: the whole line.
      called: names of computations.
      condition: of a while loop, or "".
      times: that a loop is known to run, 0 if it is unknown; of everything else 1.
    """

    result: str
    operation: str
    text: str
    called: tuple[str, ...]
    condition: str
    times: int


class _Computation(NamedTuple):
    lines: list[Instruction]
    limits: list[int]  # constants that a loop's counter may be compared with


class Run(NamedTuple):
    """An instruction, how often it runs, and in which loop's turn it stands."""

    instruction: Instruction
    times: int
    turn: int  # equal for all instructions that one turn of a loop comes to


def runs(hlo: str) -> Iterator[Run]:
    """All instructions that are reached from the entry, those of called computations included.

    Args:
      hlo: text of a compiled module, as `compiled.as_text()` gives it.

    Yields:
      Each with how often it runs: loops as often as the compiler says, or else as the constant says
      that a counter from 0 is compared with, the form in which TPU programs have `lax.scan`.
      Another loop counts once.
    """
    computations, entry = _parse(hlo)
    turns = iter(range(len(hlo)))
    yield from _walk(computations, entry, 1, (next(turns), turns))


def _walk(
    computations: dict[str, _Computation], name: str, times: int, turn: tuple[int, Iterator[int]]
) -> Iterator[Run]:
    here, more = turn
    for line in computations[name].lines if name in computations else ():
        yield Run(line, times, here)
        count = line.times or _limit(computations, line.condition)
        for called in line.called:
            inner = (next(more), more) if line.condition else turn
            yield from _walk(computations, called, times * count, inner)


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
        elif found := _INSTRUCTION.match(text):
            computations[current].lines.append(_instruction(text, *found.groups()))
    return computations, entry


def _instruction(text: str, result: str, operation: str) -> Instruction:
    if operation not in _CALLERS:
        return Instruction(result, operation, text, (), "", 1)
    trips, condition = _TRIPS.search(text), _CONDITION.search(text)
    loop = operation == "while"
    called = tuple(name for names in _CALLED.findall(text) for name in _NAME.findall(names) if name)
    times = int(trips.group(1)) if loop and trips else int(not loop)
    return Instruction(
        result, operation, text, called, condition.group(1) if loop and condition else "", times
    )
