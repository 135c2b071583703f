"""The paradox and the cure, over several seeds: `python launch/paradox.py --out=docs/results`.

Runs configs/shapes_grpo.py and configs/shapes_pec.py for each seed (finished runs are skipped,
interrupted ones resume), then writes `paradox.md` with the numbers and their spread, and the
sample grids `base.png`, `grpo.png` and `pec.png` of the first seed, all with the same prompts and
noise.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from pec_jax.errors import RunError
from pec_jax.evaluation.run_table import check_schema

_OUT = flags.DEFINE_string("out", "docs/results", "Directory of the table and the grids.")
_RUNS = flags.DEFINE_string("runs", "runs/paradox", "Directory of the run directories.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds that each config is trained on.")

ROOT = Path(__file__).parents[1]
CONFIGS = ("shapes_grpo", "shapes_pec")


def run(config: str, seed: str, runs: Path) -> Path:
    """One training run; returns its directory."""
    directory = runs / f"{config}_{seed}"
    if not (directory / "eval.json").exists():
        command = [
            sys.executable,
            "-m",
            "pec_jax.main",
            f"--config={ROOT / 'configs' / config}.py",
            f"--workdir={directory}",
            f"--config.seed={seed}",
        ]
        subprocess.run(command, cwd=ROOT, check=True)
    return directory


def measure(directory: Path) -> dict[str, float]:
    """What the claim is about, of one run; shares are of the base model's numbers.

    Raises:
        RunError: a run of an earlier version.
    """
    result = json.loads((directory / "eval.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    check_schema(config, directory / "config.json")
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines if '"entropy/policy"' in line]
    entropies = [step["entropy/policy"] for step in steps]
    sampled = [step["entropy/policy_mc"] for step in steps]
    reward = max(config["rewards"], key=lambda name: config["rewards"][name]["weight"])
    variance = f"diversity/variance_{config['perception']['encoder']}"
    seconds = [step["time/step_seconds"] for step in steps[1:]]
    return {
        "reward, base": result[f"base/quality/{reward}"],
        "reward": result[f"quality/{reward}"],
        "reward gain": result[f"quality/{reward}"] - result[f"base/quality/{reward}"],
        "perceptual variance, base": result[f"base/{variance}"],
        "perceptual variance": result[variance],
        "variance kept": result[variance] / result[f"base/{variance}"],
        "attributes right, base": result["base/quality/attributes"],
        "attributes right": result["quality/attributes"],
        # Analytic, hence constant by construction. The Monte-Carlo one is a witness of its value:
        # the log-prob of a step that was just taken depends on its noise and its std alone.
        "policy entropy, range over the run": max(entropies) - min(entropies),
        "policy entropy by Monte-Carlo, first 10 iterations": float(np.mean(sampled[:10])),
        "policy entropy by Monte-Carlo, last 10 iterations": float(np.mean(sampled[-10:])),
        "seconds per iteration, median": float(np.median(seconds)),
    }


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Mean and range over the seeds, one column per config."""
    names = list(next(iter(rows.values()))[0])
    lines = ["| | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    for name in names:
        cells = []
        for runs in rows.values():
            values = [row[name] for row in runs]
            cells.append(f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(rows: dict[str, list[dict[str, float]]]) -> str:
    """The four claims, each with the number of every seed."""
    grpo, pec = (rows[name] for name in CONFIGS)
    lost = [1 - row["variance kept"] for row in grpo]
    kept = [row["variance kept"] for row in pec]
    gains = [a["reward gain"] / b["reward gain"] for a, b in zip(pec, grpo)]
    still = max(row["policy entropy, range over the run"] for row in grpo)

    def line(claim: str, values: list[float], bound: float) -> str:
        numbers = ", ".join(f"{value:.1%}" for value in values)
        met = sum(value >= bound for value in values)
        return f"- {claim} (target {bound:.0%}): {numbers}; {met} of {len(values)} seeds."

    return "\n".join(
        [
            line("Flow-GRPO loses this much of the base model's perceptual variance", lost, 0.6),
            f"- Meanwhile its policy entropy moves by at most {still:.1e} nats (target 1e-6).",
            line("PEC keeps this much of Flow-GRPO's reward gain", gains, 0.75),
            line("PEC keeps this much of the base model's perceptual variance", kept, 0.75),
        ]
    )


def copy_grids(directories: dict[str, Path], out: Path) -> None:
    """The first seed's grids: base, collapsed, and not."""
    grids = sorted((directories["shapes_grpo"] / "samples").glob("step_*.png"))
    shutil.copy(grids[0], out / "base.png")
    for name, directory in directories.items():
        last = sorted((directory / "samples").glob("step_*.png"))[-1]
        shutil.copy(last, out / f"{name.removeprefix('shapes_')}.png")


def main(argv: list[str]) -> None:
    """Runs what is missing and writes the report."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    out, runs = Path(_OUT.value), Path(_RUNS.value)
    out.mkdir(parents=True, exist_ok=True)
    directories = {name: [run(name, seed, runs) for seed in _SEEDS.value] for name in CONFIGS}
    try:
        rows = {name: [measure(d) for d in ds] for name, ds in directories.items()}
    except RunError as error:
        sys.exit(f"Error: {error}")
    copy_grids({name: ds[0] for name, ds in directories.items()}, out)
    text = f"""# The paradox and the cure

Made by `python launch/paradox.py`; held-out open prompts, {len(_SEEDS.value)} seeds; mean and
range over the seeds.

{verdict(rows)}

{table(rows)}

The same prompts and the same noise, seed {_SEEDS.value[0]}: the base model, after Flow-GRPO, and
after Flow-GRPO with the perceptual entropy constraint.

![base model](base.png)
![Flow-GRPO](grpo.png)
![PEC](pec.png)
"""
    (out / "paradox.md").write_text(text, encoding="utf-8")
    print(verdict(rows))


if __name__ == "__main__":
    app.run(main)
