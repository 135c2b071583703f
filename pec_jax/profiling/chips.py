"""What chips can do, by their makers' data sheets, and the shortest time of a step on them.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x, read in 2026; bytes and not Gibibytes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      hbm_bytes: of memory.
      flops: bf16 operations a second.
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second that it receives from its neighbours, over all links together:
        half of what the sheets call bidirectional. At the edge of a slice without wrap-around a
        chip has fewer links.
      clock: cycles a second, from the peak: a matrix unit does 128 x 128 (v6e: 256 x 256) products
        and sums a cycle, and a chip has 4 (v4, v5p: 8) of them. Of tpu7x nobody says; 0.
    """

    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    clock: float


CHIPS = {
    "v4": Chip(34.4e9, 275e12, 1228e9, 300e9, 1.05e9),
    "v5e": Chip(17.2e9, 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip(102.8e9, 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(34.4e9, 918e12, 1640e9, 400e9, 1.75e9),
    "tpu7x": Chip(206.2e9, 2307e12, 7380e9, 600e9, 0.0),
}


class Roofline(NamedTuple):
    """The shortest time that a step can take, if computing and communicating overlap fully."""

    seconds: float
    mfu: float  # share of the chips' peak at that time
    bound_by: str  # compute | memory | collectives


def roofline(chip: Chip, flops: float, hbm_bytes: float, collective_bytes: float) -> Roofline:
    """The bound of one step.

    Args:
      chip: of which there are several.
      flops: a chip and step.
      hbm_bytes: read and written, a chip and step.
      collective_bytes: received, a chip and step.
    """
    times = {
        "compute": flops / chip.flops,
        "memory": hbm_bytes / chip.hbm_bandwidth,
        "collectives": collective_bytes / chip.ici_bandwidth,
    }
    bound_by = max(times, key=lambda name: times[name])
    seconds = times[bound_by]
    return Roofline(seconds, flops / chip.flops / seconds if seconds else 0.0, bound_by)
