"""What each entropy estimator costs: `python benchmarks/estimators.py`.

Times the three estimators on features of real and of laptop size, interleaved in one process so
that whatever else the machine does falls on all of them alike, and prints medians and their ratio
to the cheapest. Forward only: the surprisal is a reward, so nothing is differentiated through it.
"""

from __future__ import annotations

import functools
import time

import jax
import numpy as np
from absl import app, flags

from pec_jax.perception.entropy import ESTIMATORS

_ROUNDS = flags.DEFINE_integer("rounds", 30, "Timed calls of each.", lower_bound=3)

# (P, K, d): the embedded model; Flow-GRPO's batch in DINO's space, in PickScore's and CLIP's.
SIZES = ((6, 16, 64), (48, 24, 768), (48, 24, 1024))
OPTIONS = {"gaussian": {"bandwidth": 0.5}, "logdet": {}, "knn": {"k": 3}}


def measure(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Median seconds of each estimator on features of one shape."""
    features = jax.random.normal(jax.random.key(0), shape)
    functions = {
        name: jax.jit(functools.partial(estimate, **OPTIONS[name]))
        for name, estimate in ESTIMATORS.items()
    }
    for function in functions.values():
        jax.block_until_ready(function(features))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(features))
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def main(argv: list[str]) -> None:
    """Prints a table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {_ROUNDS.value} rounds\n")
    print("| P, K, d | " + " | ".join(ESTIMATORS) + " |")
    print("|---|" + "---:|" * len(ESTIMATORS))
    for shape in SIZES:
        medians = measure(shape, _ROUNDS.value)
        least = min(medians.values())
        cells = [f"{v * 1e3:.2f} ms ({v / least:.1f}x)" for v in medians.values()]
        print(f"| {', '.join(map(str, shape))} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    app.run(main)
