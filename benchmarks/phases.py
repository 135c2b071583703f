"""Seconds of each phase of an iteration: `python benchmarks/phases.py --config=configs/F.py`.

Each phase is compiled by itself and timed to its end, in turns, so that a drift of the machine
hits all alike; the whole step is timed beside them. Prints a table and one JSON object.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from pec_jax import assemble
from pec_jax.config import from_config_dict
from pec_jax.errors import quiet_libraries
from pec_jax.program import initial_state
from pec_jax.train_step import rollout, score, train_step
from pec_jax.update import update

ROOT = Path(__file__).parents[1]
_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file to time.")
_RUNS = flags.DEFINE_integer("runs", 20, "Timed runs of each phase.", lower_bound=1)


def compile_phases(world, state, batch, key):
    """Name -> (compiled function of no arguments, seconds it took to compile)."""
    program, frozen = world.program, jax.device_put(world.frozen)
    compiled = {}

    def add(name, function, *arguments):
        start = time.perf_counter()
        executable = jax.jit(functools.partial(function, program)).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        compiled[name] = (lambda: jax.block_until_ready(executable(*arguments)), seconds)
        return compiled[name][0]()

    trajectory = add("rollout", rollout, state.params, frozen, batch, key)
    experience = add("decode, score, entropy", score, frozen, batch, trajectory)
    add("update", update, state, frozen, batch, experience, key)
    add("whole step", train_step, state, frozen, batch, key)
    return compiled


def main(argv: list[str]) -> None:
    """Loads, compiles, times."""
    del argv
    start = time.perf_counter()
    world = assemble.make_world(from_config_dict(_CONFIG.value))
    load_seconds = time.perf_counter() - start
    params = jax.tree.map(jnp.asarray, world.params)
    state = initial_state(params, world.program.optimizer, world.config.constraint.weight)
    batch = jax.device_put(world.train.gather(np.arange(world.config.batch.groups)))
    phases = compile_phases(world, state, batch, jax.random.key(0))
    times = {name: [] for name in phases}
    for _ in range(_RUNS.value):
        for name, (function, _) in phases.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    rows = {
        name: {"median_s": float(np.median(times[name])), "compile_s": phases[name][1]}
        for name in phases
    }
    for name, row in rows.items():
        print(f"{name:24} {row['median_s']:8.3f} s   compiled in {row['compile_s']:6.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"phases": rows, "load_s": load_seconds, "peak_memory_gib": peak}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for the configs
    quiet_libraries()
    flags.mark_flag_as_required("config")
    app.run(main)
