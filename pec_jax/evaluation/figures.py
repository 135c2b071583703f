"""The paper's figures: training curves, reward against entropy, quality against diversity.

Drawn through matplotlib's objects, never its global state, so that nothing is left behind and no
screen is needed. Colours are Okabe and Ito's, which the colour-blind can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pec_jax.evaluation.fit import exponential_fit
from pec_jax.evaluation.table import DIVERSITY, QUALITY, Row, student_interval

Steps = Sequence[Mapping[str, float]]  # the training lines of one run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
LINES = ("-", "--", ":", "-.")
PANELS = (
    ("reward/mean", "reward"),
    ("reward/std", "reward std within a prompt"),
    ("entropy/policy", "policy entropy (nats/dim)"),
    ("entropy/perceptual", "perceptual entropy (nats/dim)"),
    ("diversity/variance_perceptual", "perceptual variance"),
    ("diversity/variance_pixel", "pixel variance"),
)
SMOOTHING = 7  # iterations in the moving average


def training_curves(runs: Mapping[str, Sequence[Steps]]) -> Figure:
    """Mean over seeds with a band from the least to the greatest, one panel per metric.

    Args:
        runs: label -> the training lines of each seed's run.

    Returns:
        The figure. Runs of one label are cut to the shortest.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    all_axes = figure.subplots(2, 3).ravel()
    for axes, (metric, title) in zip(all_axes, PANELS):
        for index, (label, seeds) in enumerate(runs.items()):
            curves = [
                smooth([step.get(metric, math.nan) for step in steps]) for steps in seeds if steps
            ]
            if not curves:
                continue
            length = min(map(len, curves))
            values = np.stack([curve[:length] for curve in curves])
            iterations = np.arange(1, length + 1)
            style = style_of(index)
            axes.plot(iterations, values.mean(axis=0), label=_shown(label), lw=1.5, **style)
            axes.fill_between(
                iterations, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15
            )
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        f"Training: mean over seeds, band from least to greatest, {SMOOTHING}-iteration"
        " moving average",
        fontsize=11,
    )
    return figure


def spread_and_distance(
    runs: Mapping[str, Sequence[Steps]], panels: Sequence[tuple[str, str]]
) -> Figure:
    """Evaluations over training: mean over seeds with a band from the least to the greatest.

    Args:
        runs: label -> the evaluations of each seed's run, at the same steps.
        panels: (metric, title), such as quality, diversity and distance from the base model.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (metric, title) in zip(all_axes, panels):
        for index, (label, seeds) in enumerate(runs.items()):
            values = np.array([[line[metric] for line in lines] for lines in seeds])
            steps, style = [line["step"] for line in seeds[0]], style_of(index)
            axes.plot(steps, values.mean(axis=0), label=_shown(label), lw=2.0, **style)
            axes.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15
            )
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def reward_entropy(runs: Mapping[str, Sequence[Steps]]) -> Figure:
    """Reward against exp(H_perc), one point per iteration, with the fit R = -a exp(H) + b.

    Args:
        runs: as for `training_curves`; one panel per label.
    """
    columns = min(4, max(1, len(runs)))
    rows = max(1, -(-len(runs) // columns))
    figure = Figure(figsize=(3.4 * columns, 3.0 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (label, seeds) in zip(all_axes, runs.items()):
        steps = [step for steps in seeds for step in steps]
        rewards = [step.get("reward/mean", math.nan) for step in steps]
        entropies = [step.get("entropy/perceptual", math.nan) for step in steps]
        spread = np.exp(entropies)
        axes.scatter(spread, rewards, s=6, alpha=0.4, color=COLOURS[0], linewidths=0)
        fit = exponential_fit(rewards, entropies)
        title = _shown(label)
        if math.isfinite(fit.a):
            ends = np.array([np.nanmin(spread), np.nanmax(spread)])
            axes.plot(ends, -fit.a * ends + fit.b, color=COLOURS[1])
            title += f"\na = {fit.a:.3g}, b = {fit.b:.3g}, R² = {fit.r2:.2f}"
        axes.set_title(title, fontsize=8)
        axes.grid(alpha=0.3)
    for axes in all_axes[len(runs) :]:
        axes.set_visible(False)
    figure.supxlabel("exp(perceptual entropy)")
    figure.supylabel("reward")
    return figure


def quality_diversity(rows: Sequence[Row]) -> Figure:
    """The two normalised averages of each row, their 95% intervals, and the Pareto front.

    Args:
        rows: normalised.
    """
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    quality, diversity = ([row.mean(name) for row in rows] for name in (QUALITY, DIVERSITY))
    front = pareto_front(quality, diversity)
    axes.plot(
        [quality[i] for i in front],
        [diversity[i] for i in front],
        color="#999999",
        lw=6,
        alpha=0.3,
        label="Pareto front",
        zorder=0,
    )
    for index, row in enumerate(rows):
        _point(axes, row, index)
    axes.set_xlabel("quality, normalised average")
    axes.set_ylabel("diversity, normalised average")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def pareto_front(quality: Sequence[float], diversity: Sequence[float]) -> list[int]:
    """Which points no other point beats in one of the two without losing in the other.

    Args:
        quality: [N].
        diversity: [N].

    Returns:
        Indices into them, by falling diversity. Of equal points all are named.
    """
    points = list(zip(quality, diversity))

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other != point and other[0] >= point[0] and other[1] >= point[1] for other in points
        )

    kept = [i for i, point in enumerate(points) if not beaten(point)]
    return sorted(kept, key=lambda i: (-points[i][1], points[i][0]))


def smooth(values: Sequence[float], width: int = SMOOTHING) -> np.ndarray:
    """Moving average [T], centred, over what there is at the ends; nan values are left out."""
    array = np.asarray(values, np.float64)
    half = width // 2
    windows = [array[max(0, i - half) : i + half + 1] for i in range(len(array))]
    return np.array(
        [np.nanmean(w) if np.isfinite(w).any() else math.nan for w in windows], np.float64
    )


def style_of(index: int) -> dict[str, str]:
    """Colour and line of the index-th row; no two of the first 32 are alike."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def _shown(label: str) -> str:
    """A label as matplotlib shows it as it is: `$` begins no formula, `_` hides none."""
    return ("" if label[:1] != "_" else " ") + label.replace("$", r"\$")


def _point(axes: Axes, row: Row, index: int) -> None:
    x, y = (student_interval(list(row.values[name].values())) for name in (QUALITY, DIVERSITY))
    axes.errorbar(
        x.mean,
        y.mean,
        xerr=None if math.isnan(x.half) else x.half,
        yerr=None if math.isnan(y.half) else y.half,
        fmt="osDv"[index // len(COLOURS) % 4],
        color=COLOURS[index % len(COLOURS)],
        elinewidth=0.8,
        alpha=0.9,
        label=_shown(row.label),
    )
