"""How long the TPU's compiler expects its own program to take: the cycles it wrote down.

They are of its cost model, which nothing here checks: good for comparing two programs, and for
finding what a program spends its time on. Where the model has no rule for an operation (loops of
elementwise operations, copies, slices) it still writes a number down, and seems to exaggerate.
"""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

from pec_jax.profiling.chips import Chip
from pec_jax.profiling.hlo import Instruction, runs

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
# Of a name what says where in the program's loops it stands, not in which network.
_LOOPS = re.compile(
    r"jit\(train_step\)/|(?:while/body|closed_call|checkpoint|rematted_computation)/"
)
_LAYERS = re.compile(r"\.\d+:\d+")


class Schedule(NamedTuple):
    """One step on one chip.

    Attributes:
      seconds: of all operations, one after another.
      products: of these, of fusions around matrix products and convolutions.
      kernels: how often a kernel of our own runs, which the compiler does not estimate and which is
        not in `seconds`.
      mfu: share of the chip's peak in `seconds`; a little too high where there are kernels.
    """

    seconds: float
    products: float
    kernels: int
    mfu: float


def schedule(hlo: str, chip: Chip, flops: float) -> Schedule | None:
    """The compiler's estimate of a step.

    Args:
      hlo: text of a compiled module, as `compiled.as_text()` gives it.
      chip: that it is compiled for.
      flops: of the step, a chip.

    Returns:
      None where the program has no estimates, as on a CPU, or the chip's clock is unknown.
    """
    cycles, products, kernels = 0, 0, 0
    for instruction, times, _ in runs(hlo):
        if found := _CYCLES.search(instruction.text):
            cycles += int(found.group(1)) * times
            products += int(found.group(1)) * times * _is_product(instruction)
        elif _KERNEL.search(instruction.text):
            kernels += times
    if not (cycles and chip.clock):
        return None
    seconds = cycles / chip.clock
    return Schedule(seconds, products / chip.clock, kernels, flops / chip.flops / seconds)


def longest(hlo: str, chip: Chip, count: int) -> list[tuple[str, float]]:
    """Where a step spends its time: operations of the source and their seconds, the longest first.

    Layers of a run, forward passes inside loops and equal operations count together. Nothing where
    `schedule` knows nothing.
    """
    if not chip.clock:
        return []
    cycles: collections.Counter[str] = collections.Counter()
    for instruction, times, _ in runs(hlo):
        if found := _CYCLES.search(instruction.text):
            source = _SOURCE.search(instruction.text)
            name = _LAYERS.sub("", _LOOPS.sub("", source.group(1))) if source else "?"
            kind = "product" if _is_product(instruction) else instruction.operation
            cycles[f"{name} ({kind})"] += int(found.group(1)) * times
    return [(name, number / chip.clock) for name, number in cycles.most_common(count)]


def _is_product(instruction: Instruction) -> bool:
    """A fusion whose output comes from a product is of the kind kOutput on TPU."""
    return "kind=kOutput" in instruction.text or instruction.operation in ("dot", "convolution")
