"""What the study's runs say of each claim: `claims.md`, every number with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WARM_UP = 16  # iterations that pec_target's dual variable has to find its value


def write(runs: Path, out: Path, rewards: Sequence[str]) -> None:
    """Writes claims.md beside the tables."""
    parts = ["# What the runs say\n\nMade by `python launch/study.py`.\n"]
    for reward in rewards:
        directories = sorted(path.parent for path in (runs / reward).glob("*/eval.json"))
        parts.append(f"## Trained on `{reward}`\n\n{_of_reward(directories)}\n")
    every = [path.parent for reward in rewards for path in (runs / reward).glob("*/eval.json")]
    parts.append(f"## The estimators on the same images\n\n{estimator_ranks(sorted(every))}\n")
    (out / "claims.md").write_text("\n".join(parts), encoding="utf-8")
    print(f"Claims: {out / 'claims.md'}")


def _of_reward(directories: Sequence[Path]) -> str:
    from pec_jax.evaluation import run_table, table

    found = run_table.rows_of_runs(run_table.find_runs(directories))
    rows = table.normalise([row for row, _ in found])
    grpo = next(row for row in rows if row.method == "Flow-GRPO")
    lines = ["Overall, as a multiple of Flow-GRPO's, seed by seed (mean, 95% interval):\n"]
    for row in sorted(rows, key=lambda row: -row.mean(table.OVERALL)):
        if row is not grpo:
            lines.append(f"- {row.label}: {_interval(table.ratio(row, grpo))}")
    lines.append("\nThe perceptual version of each baseline over its latent one:\n")
    for method in ("Entropy Reg.", "Clip-Cov", "KL-Cov"):
        by_space = {row.perceptual_space: row for row in rows if row.method == method}
        if {"latent", "pickscore"} <= set(by_space):
            value = table.ratio(by_space["pickscore"], by_space["latent"])
            lines.append(f"- {method}: {_interval(value)}")
    lines.append("\n" + both_at_once(rows))
    lines.append("\n" + _targets_held(directories))
    lines.append("\n" + policy_entropy_range(directories))
    lines.append("\n" + fits(directories))
    return "\n".join(lines)


def policy_entropy_range(directories: Sequence[Path]) -> str:
    """How far the policy's entropy moves over all iterations of all runs."""
    steps = [step for directory in directories for step in _steps(directory)]
    exact = [step["entropy/policy"] for step in steps]
    sampled = np.array([step["entropy/policy_mc"] for step in steps])
    moved = max(exact) - min(exact)
    return (
        f"The policy's entropy over all {len(steps)} iterations: {exact[0]:.4f} nats per "
        f"dimension, and moves by {moved:.1e}; as sampled, {sampled.mean():.4f} with a standard "
        f"deviation of {sampled.std():.4f}."
    )


def fits(directories: Sequence[Path]) -> str:
    """The paper's R = -a exp(H_perc) + b over the iterations of each plain Flow-GRPO run."""
    lines = ["R = -a exp(H_perc) + b over the iterations of Flow-GRPO, by seed:\n"]
    for directory in directories:
        if directory.name.startswith("none_"):
            found = json.loads((directory / "eval.json").read_text("utf-8"))
            a, b, r2 = (found.get(f"fit/{name}", math.nan) for name in ("a", "b", "r2"))
            lines.append(f"- {directory.name}: a = {a:.4f}, b = {b:.4f}, R^2 = {r2:.2f}")
    return "\n".join(lines)


def _steps(directory: Path) -> list[dict[str, float]]:
    """The training lines of a run's metrics."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [step for step in map(json.loads, lines) if "reward/mean" in step]


def both_at_once(rows) -> str:
    """Rows with at least Flow-GRPO's quality and at least the base model's diversity."""
    from pec_jax.evaluation import table

    base, grpo = (next(r for r in rows if r.method == name) for name in ("Base", "Flow-GRPO"))
    reached = [
        row.label
        for row in rows
        if row.mean(table.QUALITY) >= grpo.mean(table.QUALITY)
        and row.mean(table.DIVERSITY) >= base.mean(table.DIVERSITY)
    ]
    text = ", ".join(reached) or "none"
    return (
        f"At least Flow-GRPO's quality ({grpo.mean(table.QUALITY):.3f}) and at least the base "
        f"model's diversity ({base.mean(table.DIVERSITY):.3f}) at once: {text}."
    )


def _targets_held(directories: Sequence[Path]) -> str:
    lines = [f"`pec_target` after {WARM_UP} iterations, H_perc against its target:\n"]
    for directory in directories:
        if not directory.name.startswith("pec_target"):
            continue
        held = target_held(directory)
        lines.append(
            f"- {directory.name}: H* = {held['target']:.3f}, mean H_perc = {held['mean']:.3f}; "
            f"off by {held['relative']:+.1%} of H*, and exp(H_perc) by {held['spread']:+.1%}"
        )
    return "\n".join(lines) if len(lines) > 1 else ""


def target_held(directory: Path) -> dict[str, float]:
    """How far a pec_target run's perceptual entropy is from its target after warm-up."""
    after = [step for step in _steps(directory) if step["step"] > WARM_UP]
    target = after[0]["constraint/pec_target/target"]
    mean = float(np.mean([step["entropy/perceptual"] for step in after]))
    return {
        "target": target,
        "mean": mean,
        "relative": (mean - target) / abs(target),
        "spread": math.expm1(mean - target),
    }


def estimator_ranks(directories: Sequence[Path]) -> str:
    """Spearman's rank correlation over runs, of each estimator's H_perc with other measures."""
    from scipy import stats

    evaluations = [json.loads((d / "eval.json").read_text("utf-8")) for d in directories]
    lines = ["| H_perc | gaussian | logdet | knn | Vendi score | pairwise distance |"]
    lines.append("|---|" + "---:|" * 5)
    for space in ("dino", "clip", "pickscore"):
        others = [f"entropy/{name}_{space}" for name in ("gaussian", "logdet", "knn")]
        others += [f"diversity/vendi_{space}", f"diversity/{space}"]
        for name in ("gaussian", "logdet", "knn"):
            mine = [e[f"entropy/{name}_{space}"] for e in evaluations]
            cells = [
                f"{stats.spearmanr(mine, [e[other] for e in evaluations]).statistic:.3f}"
                for other in others
            ]
            lines.append(f"| {name}, {space} | " + " | ".join(cells) + " |")
    return f"Over {len(evaluations)} runs:\n\n" + "\n".join(lines)


def _interval(value) -> str:
    half = "" if math.isnan(value.half) else f" ± {value.half:.2f}"
    return f"{value.mean:.2f}{half}"
