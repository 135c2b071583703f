"""Clocks, peaks and memory: what every contestant of a benchmark is measured with."""

from __future__ import annotations

import collections
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.profiling.chips import CHIPS

# A contestant does its work to the end; what it returns is its own split of the time, or None.
Contestant = Callable[[], Mapping[str, float] | None]

# jax's device_kind -> the chip's name in `cost.chips`.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}
_PEAK_SIZES = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


def interleave(
    contestants: Mapping[str, Contestant], runs: int
) -> tuple[dict[str, list[float]], dict[str, list[Mapping[str, float]]]]:
    """Times all contestants in turns, so that a drift of the machine hits all of them alike.

    Each round begins with another one, for a contestant may leave caches and threads to its
    successor in a state that costs time. Ctrl-C ends it with the rounds that are complete.

    Args:
      contestants: name -> what to time; each has run once already.
      runs: rounds.

    Returns:
      Name -> seconds of each round, and name -> its own split of them, where it gives one.
    """
    names = list(contestants)
    rounds: list[dict[str, tuple[float, Mapping[str, float] | None]]] = []
    try:
        for turn in range(runs):
            first = turn % len(names)
            timed = {n: _timed(contestants[n]) for n in names[first:] + names[:first]}
            rounds.append(timed)
            shown = ", ".join(f"{name} {timed[name][0]:.4g} s" for name in names)
            print(f"round {turn + 1} of {runs}: {shown}", file=sys.stderr)
    except KeyboardInterrupt:
        if not rounds:
            raise
    seconds = {name: [timed[name][0] for timed in rounds] for name in names}
    splits = {name: [timed[name][1] for timed in rounds] for name in names}
    return seconds, {n: [s for s in found if s is not None] for n, found in splits.items()}


def _timed(contestant: Contestant) -> tuple[float, Mapping[str, float] | None]:
    """Seconds that it takes, and its own split of them."""
    start = time.perf_counter()
    split = contestant()
    return time.perf_counter() - start, split


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles of the seconds of one contestant."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return {"median_s": float(middle), "quartile_1_s": float(low), "quartile_3_s": float(high)}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """The ratio of two contestants' medians, and the median of their ratios in the same round."""
    rounds = np.asarray(above) / np.asarray(below)
    return {
        "of_medians": float(np.median(above) / np.median(below)),
        "median_of_rounds": float(np.median(rounds)),
    }


def big_product() -> tuple[Contestant, float]:
    """A large matrix product on one device, whose fastest run is taken as the device's peak.

    fp32 on a CPU, bf16 elsewhere. On a CPU it uses all the cores that jax has.

    Returns:
      What to time, and its floating-point operations.
    """
    backend = jax.default_backend()
    size = _PEAK_SIZES.get(backend, 8192)
    dtype = jnp.float32 if backend == "cpu" else jnp.bfloat16
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.dot)

    def run() -> None:
        jax.block_until_ready(multiply(a, a))

    run()
    return run, 2.0 * size**3


def data_sheet_peak() -> float | None:
    """bf16 operations a second of the TPU that is there; None for anything else."""
    name = _TPU_KINDS.get(jax.devices()[0].device_kind)
    return CHIPS[name].flops if name else None


def peak_memory() -> dict[str, Any]:
    """The peak of this process so far, GiB: of the device where it counts, else of the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"gib": statistics["peak_bytes_in_use"] / 2**30, "of": "one device, by jax"}
    # Linux counts kibibytes.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"gib": resident, "of": "the process (resident), all contestants together"}


def compiled_memory(executable: Any) -> float | None:
    """GiB that the compiler sets aside for one program on one device, its arguments included."""
    sizes = executable.memory_analysis()
    if sizes is None:
        return None
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return (total - sizes.alias_size_in_bytes) / 2**30


# How a compiled program names the kernels that it takes from libraries, and those it generates for
# matrix products: `custom_call_target="__cudnn$fmhaSoftmax"`, `"kind":"__triton_gemm"`.
_KERNEL = re.compile(r'(?:custom_call_target=|"kind":)"(__?[\w$]+)"')


def library_kernels(executable: Any) -> dict[str, int]:
    """Name of each library kernel in a compiled program -> how often it stands there.

    A kernel in a loop counts once.
    """
    return dict(sorted(collections.Counter(_KERNEL.findall(executable.as_text())).items()))
