"""The collectives of a compiled program, read from its HLO text, loops times their length."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from pec_jax.profiling.hlo import Instruction, runs

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
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")


class Collective(NamedTuple):
    """How often a kind of collective runs in one step, and the bytes of its results on a chip."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nothing here needs
    bytes: int


def collectives(hlo: str) -> dict[str, Collective]:
    """The collectives of one step.

    Args:
      hlo: text of a compiled module, as `compiled.as_text()` gives it.

    Returns:
      Kind -> how often it runs (see `hlo.runs`) and the bytes that one chip has in hand after it.
    """
    totals = dict.fromkeys(KINDS, Collective(0, 0))
    seen = set()  # channels: the parts of an asynchronous collective share one
    for instruction, times, turn in runs(hlo):
        kind = instruction.operation.removesuffix("-start")
        if kind not in KINDS:
            continue
        if channel := _CHANNEL.search(instruction.text):
            if (turn, channel.group(1)) in seen:
                continue
            seen.add((turn, channel.group(1)))
        before = totals[kind]
        size = _result_bytes(kind, instruction)
        totals[kind] = Collective(before.count + times, before.bytes + size * times)
    return {kind: total for kind, total in totals.items() if total.count}


def _result_bytes(kind: str, instruction: Instruction) -> int:
    # The tuple of an asynchronous start holds operands and results: the last shape is the
    # result's, but for all-reduce and permutes, where both are alike.
    shapes = _SHAPE.findall(instruction.result)
    if instruction.operation.endswith("-start"):
        shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
    return sum(map(_size, shapes))


def _size(shape: tuple[str, str]) -> int:
    dtype, dims = shape
    return _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
