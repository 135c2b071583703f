"""What one iteration costs, by phase, against another method, and against torch.

    python benchmarks/iteration.py --config=configs/shapes_grpo.py --torch=eager,compiled
    python benchmarks/iteration.py --config=configs/shapes_pec.py --against=none \\
        --estimators=gaussian,logdet,knn
    python benchmarks/iteration.py --config=configs/sd3_grpo.py --random --torch=eager,compiled \\
        --peak_tflops=989 --config.batch.groups=2 --config.batch.group_size=8

Everything named is compiled, run once, and then timed in turns, so that a drift of the machine hits
all alike; medians are reported. Prints a table and, as its last line, one JSON object. Ctrl-C while
torch compiles leaves that out; while the rounds run, it ends them: what was measured is shown.

The step is timed as a run has it: one program, on the mesh of the config, its state donated. The
phases are compiled by themselves, and so do not add up to it exactly.

MFU: FLOPs counted from the program (matrix products and convolutions; an encoder that is reward
and perception once, as the compiler has it) over seconds, devices and the peak of one: that of
--peak_tflops, of a TPU's data sheet, or else of the fastest of the runs of a large matrix product
that are timed in turns with the rest (fp32 on a CPU, where it is that of all cores; else bf16).
Of a CPU that was split into several devices, MFU is a rough number.

--against=CONSTRAINTS times the same config under other constraints: none, or fields of
config.constraints such as kl.weight=0.01, with commas between them; all others are off. It is timed
twice where none of them looks at the surprisal. "CONSTRAINTS" is what a run with them does: it
measures the perceptual entropy all the same, to log it. "CONSTRAINTS, unmeasured" has no perceptual
encoder and no estimator in it: for none that is plain Flow-GRPO's iteration, the fair denominator
of what a constraint costs.

--also=FIELD=VALUE,... times the config with other fields too, such as
--also=model.remat=none,batch.update_images=4; may be given several times. One that does not fit the
device's memory is left out and said.

--torch: the same iteration with diffusers' and transformers' networks and the same weights, see
torch_reference.py; on one device. compiled: each network whole; blocks: the transformer's blocks,
which takes a fraction of the time to compile. On a CPU time it on an idle machine only: where
another process holds a core, torch's threads wait for one another, and one thread can be many times
faster than two; --torch_threads=1 --torch_threads=2 times both.

--random fills the shapes of the config's models with random numbers, those of published models too
(`pec_jax.families.registry`), and reads no weights; torch then draws its own. At the size of
SD3.5-M let the groups be few on one GPU, as above: the iteration of the paper is 0.24 EFLOP.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the configs, and for this directory by its name

from benchmarks import contestants, setups, timing  # noqa: E402
from pec_jax.config import ConfigError, from_config_dict  # noqa: E402
from pec_jax.distributed import processes as hosts  # noqa: E402
from pec_jax.errors import exit_on_user_error, quiet_libraries  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file to time.")
_RUNS = flags.DEFINE_integer("runs", 20, "Timed rounds.", lower_bound=1)
_PHASES = flags.DEFINE_bool("phases", True, "Time the phases too, not only whole steps.")
_AGAINST = flags.DEFINE_string("against", "", "Other constraints: none, or such as kl.weight=0.01.")
_ESTIMATORS = flags.DEFINE_list("estimators", [], "Time the config with each of these.")
_ALSO = flags.DEFINE_multi_string("also", [], "Time the config with other fields, F=V,F=V.")
_TORCH = flags.DEFINE_list("torch", [], "Time torch too: some of eager, compiled, blocks.")
_THREADS = flags.DEFINE_multi_integer(
    "torch_threads", None, "CPU threads of torch; given several times, each is timed; default all."
)
_RANDOM = flags.DEFINE_bool("random", False, "Random weights of the shapes of the models.")
_PEAK = flags.DEFINE_float("peak_tflops", None, "Peak of one device, TFLOP/s.", lower_bound=0.0)
_REQUIRE = flags.DEFINE_list("require", [], "Kernels that the step must have; else exit code 1.")
_JSON = flags.DEFINE_string("json", "", "Write the JSON object to this file instead.")

PEAK = "large matrix product"  # the contestant that the peak is measured with
STEP = "step"
UNMEASURED = ", unmeasured"
TORCH_KINDS = ("eager", "compiled", "blocks")


@dataclasses.dataclass
class Contest:
    """What is timed, and what is known of it beforehand."""

    run: dict[str, timing.Contestant] = dataclasses.field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, compiled: contestants.Compiled) -> None:
        """Enters something compiled, and says so."""
        print(f"{name}: compiled in {compiled.compile_s:.1f} s", file=sys.stderr)
        self.run[name] = compiled.run
        self.facts[name] = {
            "flops": compiled.flops,
            "compile_s": compiled.compile_s,
            "program_gib": compiled.memory_gib,
            "kernels": compiled.kernels,
        }


def ours(setup: setups.Setup) -> tuple[Contest, dict[str, list[str]]]:
    """Phases, the step, and its variants; and the names of the variants by kind."""
    contest, kinds = Contest(), {"phases": [], "methods": [STEP], "against": []}
    if _PHASES.value:
        for name, compiled in contestants.phases(setup).items():
            contest.add(name, compiled)
            kinds["phases"].append(name)
    contest.add(STEP, contestants.whole_step(setup))
    for estimator in _ESTIMATORS.value:
        name = f"{STEP}, {estimator}"
        variant = setups.with_estimator(setup, estimator)
        contest.add(name, contestants.whole_step(variant))
        kinds["methods"].append(name)
    for other in _ALSO.value:
        _add_variant(contest, setup, other, kinds["methods"])
    if other := _AGAINST.value:
        variant = setups.with_constraints(setup, setups.constraint_sections(other))
        contest.add(other, contestants.whole_step(variant))
        kinds["against"].append(other)
        if not setups.reading_perception(variant):
            variant = setups.without_perception(variant)
            contest.add(other + UNMEASURED, contestants.whole_step(variant))
            kinds["against"].append(other + UNMEASURED)
    return contest, kinds


def _add_variant(contest: Contest, setup: setups.Setup, other: str, names: list[str]) -> None:
    """Enters the step with other fields, unless the device has no memory for it."""
    variant = setups.with_fields(setup, setups.fields_of(other))
    try:
        contest.add(f"{STEP}, {other}", contestants.whole_step(variant))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{other} does not fit the device's memory and is left out: {_first_line(error)}")
        return
    names.append(f"{STEP}, {other}")


def add_torch(contest: Contest, setup: setups.Setup) -> list[str]:
    """Enters the torch steps that were asked for; says why where one cannot run.

    Raises:
      ConfigError: a config that the torch step does not know, or several devices.
    """
    if setup.mesh.size > 1:
        raise ConfigError(
            f"--torch runs on one device, but the mesh has {setup.mesh.size}: set config.mesh."
        )
    import torch  # not needed otherwise

    from benchmarks import torch_models, torch_reference

    torch.manual_seed(0)
    # Each contestant is one more version of the same code, and must not be left to run eagerly.
    torch._dynamo.config.recompile_limit = 64
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    models, names = torch_models.load(setup, device, drawn=_RANDOM.value), []
    print(f"torch's networks: there in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    cores = len(os.sched_getaffinity(0))
    for kind, threads in itertools.product(_TORCH.value, _THREADS.value or [cores]):
        step = torch_reference.TorchStep(setup, models, kind=kind)

        def run(step=step, threads=threads):
            torch.set_num_threads(threads)
            return step.iteration()

        start = time.perf_counter()
        name = f"torch, {kind}" + (f", threads: {threads}" if _THREADS.value else "")
        try:
            run()
        except RuntimeError as error:  # what torch.compile raises derives from it
            if kind == "eager":
                raise
            print(f"torch.compile does not work here, {kind} is left out: {_first_line(error)}")
            continue
        except KeyboardInterrupt:
            print(f"{name}: stopped after {time.perf_counter() - start:.0f} s, and left out.")
            break
        contest.run[name] = run
        contest.facts[name] = {"compile_s": time.perf_counter() - start}
        print(f"{name}: ran once in {contest.facts[name]['compile_s']:.1f} s", file=sys.stderr)
        names.append(name)
    return names


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def peak_flops(setup: setups.Setup, seconds: list[float], work: float) -> dict[str, Any]:
    """The floating-point operations a second of all devices of the mesh, and where that is from."""
    sheet = timing.data_sheet_peak()
    cpu = jax.default_backend() == "cpu"  # whose devices, if several, share the cores
    devices = 1 if cpu else setup.mesh.size
    if _PEAK.value:
        return {"flops": _PEAK.value * 1e12 * devices, "of": "--peak_tflops"}
    if sheet:
        return {"flops": sheet * devices, "of": "the data sheet, bf16"}
    kind = "fp32, all cores" if cpu else "bf16"
    size = round((work / 2) ** (1 / 3))
    of = f"measured here, the fastest of {len(seconds)} {kind} products of {size} x {size}"
    return {"flops": work / min(seconds) * devices, "of": of}


def comparison(
    kinds: Mapping[str, list[str]], seconds: Mapping[str, list[float]], contest: Contest
) -> dict[str, dict[str, Any]]:
    """Every method over every one that it is compared with: time, and FLOPs."""
    return {
        f"{above} / {below}": timing.ratio(seconds[above], seconds[below])
        | {"of_flops": contest.facts[above]["flops"] / contest.facts[below]["flops"]}
        for above in kinds["methods"]
        for below in kinds["against"]
    }


def measure(setup: setups.Setup) -> dict[str, Any]:
    """Compiles, times, and puts everything that was found into one dictionary."""
    contest, kinds = ours(setup)
    torch_names = add_torch(contest, setup) if _TORCH.value else []
    product, work = timing.big_product()
    seconds, parts = timing.interleave({**contest.run, PEAK: product}, _RUNS.value)
    peak = peak_flops(setup, seconds.pop(PEAK), work)
    images = setup.config.batch.groups * setup.config.batch.group_size
    rows = {}
    for name, times in seconds.items():
        row = rows[name] = timing.summary(times) | contest.facts[name]
        if name not in kinds["phases"]:
            row["images_per_s"] = images / row["median_s"]
        if "flops" in row:
            row["mfu"] = row["flops"] / row["median_s"] / peak["flops"]
        if parts[name]:
            row["phases"] = {
                phase: float(np.median([p[phase] for p in parts[name]])) for phase in parts[name][0]
            }
    return {
        "rows": rows,
        "ratios": comparison(kinds, seconds, contest),
        "torch_over_ours": {n: timing.ratio(seconds[n], seconds[STEP]) for n in torch_names},
        "peak": peak,
        "memory": timing.peak_memory() | _torch_memory(torch_names),
        "images": images,
        "runs": _RUNS.value,
        "device": f"{setup.mesh.size} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def _torch_memory(names: list[str]) -> dict[str, float]:
    if not names:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"torch_gib": torch.cuda.max_memory_allocated() / 2**30}


def show(result: Mapping[str, Any]) -> None:
    """The table for a person."""
    print(f"{result['device']}, jax {result['jax']}, {result['images']} images an iteration")
    peak = result["peak"]
    print(f"peak {peak['flops'] / 1e12:.4g} TFLOP/s ({peak['of']}), {result['runs']} rounds\n")
    print(f"| {'what':28} | median s | quartiles s     | images/s |   TFLOP |   MFU | compiled s |")
    print(f"|{'-' * 30}|---------:|-----------------|---------:|--------:|------:|-----------:|")
    for name, row in result["rows"].items():
        cells = [
            f"{name:28}",
            f"{row['median_s']:8.4f}",
            f"{row['quartile_1_s']:.4f} - {row['quartile_3_s']:.4f}",
            f"{row['images_per_s']:8.2f}" if "images_per_s" in row else " " * 8,
            f"{row['flops'] / 1e12:7.4f}" if "flops" in row else " " * 7,
            f"{row['mfu']:5.1%}" if "mfu" in row else " " * 5,
            f"{row['compile_s']:10.1f}",
        ]
        print("| " + " | ".join(cells) + " |")
        for phase, value in row.get("phases", {}).items():
            print(f"|   {phase:26} | {value:8.4f} |")
    print()
    for name, found in {**result["ratios"], **result["torch_over_ours"]}.items():
        work = f", FLOPs {found['of_flops']:.4f}" if "of_flops" in found else f" over {STEP}"
        print(
            f"{name}: time {found['of_medians']:.4f} (median of rounds "
            f"{found['median_of_rounds']:.4f}){work}"
        )
    memory = result["memory"]
    torch_peak = f"; torch {memory['torch_gib']:.2f} GiB" if "torch_gib" in memory else ""
    print(f"peak memory {memory['gib']:.2f} GiB: {memory['of']}{torch_peak}")
    kernels = result["rows"][STEP]["kernels"]
    print(f"library kernels in the {STEP}: {', '.join(f'{n} {k}' for k, n in kernels.items())}\n")


def main(argv: list[str]) -> None:
    """Loads, measures, reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if unknown := set(_TORCH.value) - set(TORCH_KINDS):
        raise app.UsageError(
            f"--torch is some of {', '.join(TORCH_KINDS)}, not {', '.join(sorted(unknown))}."
        )
    if _TORCH.value:  # two libraries share one device's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with exit_on_user_error():
        config = from_config_dict(_CONFIG.value)
        start = time.perf_counter()
        setup = setups.drawn(config) if _RANDOM.value else setups.loaded(config)
        result = {"load_s": time.perf_counter() - start} | measure(setup)
        if not hosts.is_primary():
            return
        show(result)
        if _JSON.value:
            Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        else:
            print(json.dumps(result))
        if absent := set(_REQUIRE.value) - set(result["rows"][STEP]["kernels"]):
            sys.exit(f"The {STEP} was compiled without {', '.join(sorted(absent))}.")


if __name__ == "__main__":
    quiet_libraries()
    flags.mark_flag_as_required("config")
    app.run(main)
