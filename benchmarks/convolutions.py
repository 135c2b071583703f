"""The embedded decoder's convolutions, one by one: XLA's beside torch's.

    python benchmarks/convolutions.py

Where the phase `decode` of iteration.py is slower than torch's, this says by which of them. In
turns, on all cores, medians in milliseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import torch
from absl import app, flags
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for this directory by its name

from benchmarks.timing import interleave, summary  # noqa: E402
from pec_jax.models.layers import Conv  # noqa: E402

IMAGES = 96  # of an iteration
# Pixels along a side, channels in and out, of all that a decoder of 48, 16 and 16 channels has.
SHAPES = ((16, 48, 48), (32, 48, 48), (32, 48, 16), (32, 16, 16), (64, 16, 16), (64, 16, 3))


def ours(size: int, fan_in: int, fan_out: int) -> Callable[[], None]:
    """Our layer, compiled."""
    x = jax.random.normal(jax.random.key(0), (IMAGES, size, size, fan_in))
    layer = Conv(fan_out)
    variables = layer.init(jax.random.key(1), x)
    compiled = jax.jit(layer.apply)

    def run() -> None:
        jax.block_until_ready(compiled(variables, x))

    return run


def torchs(size: int, fan_in: int, fan_out: int) -> Callable[[], None]:
    """torch's, with channels last, which is the faster layout."""
    layout = torch.channels_last
    x = torch.randn(IMAGES, fan_in, size, size).to(memory_format=layout)
    kernel = torch.randn(fan_out, fan_in, 3, 3).to(memory_format=layout)
    bias = torch.zeros(fan_out)

    def run() -> None:
        with torch.inference_mode():
            functional.conv2d(x, kernel, bias, padding=1)

    return run


def main(argv: list[str]) -> None:
    """Prints a row per shape."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    print("| pixels | channels | XLA, ms | torch, ms |\n|---:|---|---:|---:|")
    for shape in SHAPES:
        runs = {"xla": ours(*shape), "torch": torchs(*shape)}
        for run in runs.values():
            run()
        seconds, _ = interleave(runs, _RUNS.value)
        medians = [1e3 * summary(seconds[name])["median_s"] for name in runs]
        size, fan_in, fan_out = shape
        print(
            f"| {size} | {fan_in} to {fan_out} | {medians[0]:.1f} | {medians[1]:.1f} |", flush=True
        )


if __name__ == "__main__":
    _RUNS = flags.DEFINE_integer("runs", 20, "Rounds.", lower_bound=1)
    app.run(main)
