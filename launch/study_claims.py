"""What the study's runs say of each claim: `claims.md`, every number with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    by_label = {row.label: runs for row, (_, runs) in zip(rows[1:], found[1:])}
    lines = [paradox_and_cure(by_label), "", against_baselines(rows), "", what_is_kept(by_label)]
    lines += ["", two_judges(by_label)]
    lines.append("\nThe perceptual version of each baseline over its latent one, overall:\n")
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


class Paired(NamedTuple):
    """How one row differs from another over the seeds that both have."""

    difference: float
    effect: float  # Cohen's d_z: the mean difference in its own standard deviations
    p: float  # of Student's paired t-test, two-sided


def paired(values: Sequence[float], others: Sequence[float]) -> Paired:
    """Compares two rows seed by seed.

    Args:
        values: [S] of one row, S >= 2.
        others: [S] of the other, in the same order of seeds.
    """
    from scipy import stats

    differences = np.subtract(values, others)
    spread = differences.std(ddof=1)
    effect = (
        math.copysign(math.inf, differences.mean())
        if spread == 0
        else (differences.mean() / spread)
    )
    return Paired(
        float(differences.mean()), float(effect), float(stats.ttest_rel(values, others).pvalue)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: chances that hold for all comparisons of a family at once.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = np.argsort(p_values)
    stepped = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted.tolist()


def against_baselines(rows) -> str:
    """Overall of every row against Flow-GRPO's and against that of the best KL."""
    from pec_jax.evaluation import table

    lines = [
        "Overall, seed by seed: the ratio with its 95% interval; the paired difference with its"
    ]
    lines += ["effect size d_z (in standard deviations of the differences) and the p-value of"]
    lines += ["Student's paired test, adjusted by Holm for the number of rows.", ""]
    baselines = [row for row in rows if row.method in ("Flow-GRPO", "Flow-GRPO w/ KL")]
    others = sorted(
        (row for row in rows if row not in baselines), key=lambda row: -row.mean(table.OVERALL)
    )
    for baseline in baselines:
        compared = [row for row in [*baselines, *others] if row is not baseline]
        tests = [_paired_rows(row, baseline) for row in compared]
        adjusted = holm([test.p for test in tests])
        lines += [f"| against {baseline.label} | ratio | difference | d_z | p |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for row, test, p in zip(compared, tests, adjusted):
            ratio = _interval(table.ratio(row, baseline))
            lines += [
                f"| {row.label} | {ratio} | {test.difference:+.3f} | {test.effect:+.1f} | {p:.3f} |"
            ]
        lines += [""]
    return "\n".join(lines[:-1])


def _paired_rows(row, other) -> Paired:
    from pec_jax.evaluation import table

    common = [seed for seed in row.seeds if seed in other.seeds]
    if len(common) < 2:
        return Paired(row.mean(table.OVERALL) - other.mean(table.OVERALL), math.nan, math.nan)
    values, others = row.values[table.OVERALL], other.values[table.OVERALL]
    return paired([values[seed] for seed in common], [others[seed] for seed in common])


def paradox_and_cure(runs_of: Mapping[str, Sequence[Any]]) -> str:
    """The bars that were set before any run, seed by seed.

    Diversity is the entropy of the open attributes or the variance in DINO's space: whichever has
    lost more.

    Args:
        runs_of: label -> runs, in the same order of seeds; "Flow-GRPO" among them.
    """
    grpo = {run.seed: run.evaluation for run in runs_of["Flow-GRPO"]}
    lost = [1.0 - _kept(run) for run in runs_of["Flow-GRPO"]]
    lines = [f"Flow-GRPO loses of the base's diversity (bar 60%): {_shares(lost)}."]
    for label, runs in runs_of.items():
        if label.startswith("PEC"):
            common = [run for run in runs if run.seed in grpo]
            gained = [
                gain(run.evaluation, "quality/finish") / gain(grpo[run.seed], "quality/finish")
                for run in common
            ]
            kept = [_kept(run) for run in common]
            lines.append(
                f"{label} keeps of Flow-GRPO's gain in finish (bar 90%): {_shares(gained)}; "
                f"and of the base's diversity (bar 90%): {_shares(kept)}."
            )
    return "\n\n".join(lines)


def _kept(run: Any) -> float:
    """The least share of the base's diversity, of the two measures that the bars name."""
    names = ("diversity/attributes", "diversity/variance_dino")
    return min(run.evaluation[name] / run.evaluation[f"base/{name}"] for name in names)


def _shares(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.0f}%" for value in values)


KEPT = ("diversity/attributes", "diversity/variance_dino", "diversity/variance_clip")
GAINED = ("quality/finish", "quality/attributes", "quality/pickscore", "quality/hps")


def what_is_kept(runs_of: Mapping[str, Sequence[Any]]) -> str:
    """Shares of the base's diversity that each row keeps, and of Flow-GRPO's gains that it has.

    Args:
        runs_of: label -> runs; "Flow-GRPO" among them.
    """
    from pec_jax.evaluation import table

    grpo = {run.seed: run.evaluation for run in runs_of["Flow-GRPO"]}
    names = [*KEPT, *(f"gain in {name.removeprefix('quality/')}" for name in GAINED)]
    lines = ["Shares of the base model's diversity that are kept, and of Flow-GRPO's gains, in per"]
    lines += ["cent, with 95% intervals over the seeds:", ""]
    lines += ["| method | " + " | ".join(name.removeprefix("diversity/") for name in names) + " |"]
    lines += ["|---|" + "---:|" * len(names)]
    for label, runs in runs_of.items():
        shares = [[run.evaluation[n] / run.evaluation[f"base/{n}"] for run in runs] for n in KEPT]
        paired_runs = [run for run in runs if run.seed in grpo]
        shares += [
            [gain(run.evaluation, name) / gain(grpo[run.seed], name) for run in paired_runs]
            for name in GAINED
        ]
        cells = (_percent(table.student_interval(values)) for values in shares)
        lines += [f"| {label} | " + " | ".join(cells) + " |"]
    return "\n".join(lines)


def gain(evaluation: Mapping[str, float], name: str) -> float:
    """What training has added to a measure."""
    return evaluation[name] - evaluation[f"base/{name}"]


def two_judges(runs_of: Mapping[str, Sequence[Any]]) -> str:
    """What the preference model that only judges sees of the gain in the other one's eyes.

    The two have their own scales: what tells of over-optimisation is how the quotient of a row
    compares with that of the others.
    """
    from pec_jax.evaluation import table

    lines = ["Gains as `pickscore` and as `hps` see them; `hps` is never trained on:", ""]
    lines += ["| method | pickscore | hps | hps / pickscore |", "|---|---:|---:|---:|"]
    for label, runs in runs_of.items():
        gains = [
            [gain(run.evaluation, f"quality/{n}") for run in runs] for n in ("pickscore", "hps")
        ]
        ratios = [hps / pickscore for pickscore, hps in zip(*gains)]
        cells = (_interval(table.student_interval(values)) for values in (*gains, ratios))
        lines += [f"| {label} | " + " | ".join(cells) + " |"]
    return "\n".join(lines)


def policy_entropy_range(directories: Sequence[Path]) -> str:
    """How far the policy's entropy moves in the course of a run, at most."""
    runs = [_steps(directory) for directory in directories]
    exact = [[step["entropy/policy"] for step in steps] for steps in runs]
    moved = max(max(values) - min(values) for values in exact)
    sampled = np.array([step["entropy/policy_mc"] for steps in runs for step in steps])
    return (
        f"The policy's entropy over all {len(sampled)} iterations: {exact[0][0]:.4f} nats per "
        f"dimension, and moves by {moved:.1e} in the course of any run; as sampled, "
        f"{sampled.mean():.4f} with a standard deviation of {sampled.std():.4f}."
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
    """Rows with Flow-GRPO's quality and the base's diversity, within one standard error."""
    from pec_jax.evaluation import table

    base, grpo = (next(r for r in rows if r.method == name) for name in ("Base", "Flow-GRPO"))
    reached = [
        row.label
        for row in rows
        if _not_below(row, grpo, table.QUALITY) and _not_below(row, base, table.DIVERSITY)
    ]
    text = ", ".join(reached) or "none"
    return (
        f"At least Flow-GRPO's quality ({grpo.mean(table.QUALITY):.3f}) and at least the base "
        f"model's diversity ({base.mean(table.DIVERSITY):.3f}) at once, each within one standard "
        f"error of the paired differences: {text}."
    )


def _not_below(row, other, metric: str) -> bool:
    """Whether a row reaches another's mean, less one standard error over the seeds."""
    seeds = [seed for seed in row.seeds if seed in other.seeds]
    differences = [row.values[metric][seed] - other.values[metric][seed] for seed in seeds]
    error = np.std(differences, ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    return bool(np.mean(differences) >= -error)


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

    from pec_jax.evaluation import run_table

    spaces = ("dino", "clip", "pickscore")
    evaluations = [
        run_table.current_names(json.loads((d / "eval.json").read_text("utf-8")), spaces)
        for d in directories
    ]
    lines = ["| H_perc | gaussian | logdet | knn | Vendi score | pairwise distance |"]
    lines.append("|---|" + "---:|" * 5)
    for space in spaces:
        others = [f"entropy/{name}_{space}" for name in ("gaussian", "logdet", "knn")]
        others += [f"diversity/vendi_{space}", f"diversity/pairwise_l2_{space}"]
        for name in ("gaussian", "logdet", "knn"):
            mine = [e[f"entropy/{name}_{space}"] for e in evaluations]
            cells = [
                f"{stats.spearmanr(mine, [e[other] for e in evaluations]).statistic:.3f}"
                for other in others
            ]
            lines.append(f"| {name}, {space} | " + " | ".join(cells) + " |")
    return f"Over {len(evaluations)} runs:\n\n" + "\n".join(lines)


def _percent(value) -> str:
    half = "" if math.isnan(value.half) else f" ± {100 * value.half:.0f}"
    return f"{100 * value.mean:.0f}{half}"


def _interval(value) -> str:
    half = "" if math.isnan(value.half) else f" ± {value.half:.2f}"
    return f"{value.mean:.2f}{half}"
