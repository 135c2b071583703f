"""The paper's figures: training curves, reward against entropy, quality against diversity.

Drawn through matplotlib's objects, never its global state, so that nothing is left behind and no
screen is needed. Colours are Okabe and Ito's, which the colour-blind can tell apart; what they mean
is written beside each line and point. What belongs to the i-th label has an id that says so, see
`mark`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pec_jax.evaluation.cells import one_line
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
LABEL_SIZE = 7.5  # points
LABEL_LENGTH = 34  # characters


def mark(index: int, kind: str, *artists: Artist | None) -> None:
    """Gives artists the id by which a page finds what belongs to a row: `row-<index>-<kind>`.

    Args:
        index: of the row.
        kind: "curve" or "point", whose places are numbers; "label" for the rest.
        artists: which; None is skipped.
    """
    for artist in artists:
        if artist is not None:
            artist.set_gid(f"row-{index}-{kind}")


def training_curves(runs: Mapping[str, Sequence[Steps]]) -> Figure:
    """Mean over seeds with a band from the least to the greatest, one panel per metric.

    Args:
        runs: label -> the training lines of each seed's run; none for a label that did not train.

    Returns:
        The figure. Runs of one label are cut to the shortest.
    """
    figure = Figure(figsize=(13, 12), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(3, 2, sharex=True).ravel(), PANELS):
        ends = {}
        for index, (label, seeds) in enumerate(runs.items()):
            curves = [
                smooth([step.get(metric, math.nan) for step in steps]) for steps in seeds if steps
            ]
            if not curves:
                continue
            length = min(map(len, curves))
            values = np.stack([curve[:length] for curve in curves])
            iterations, mean = np.arange(1, length + 1), values.mean(axis=0)
            style = style_of(index)
            mark(index, "curve", *axes.plot(iterations, mean, lw=1.5, **style))
            band = axes.fill_between(
                iterations, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15
            )
            mark(index, "label", band)
            if (known := np.flatnonzero(np.isfinite(mean))).size:
                ends[index] = label, (float(iterations[known[-1]]), float(mean[known[-1]]))
        _keep_what_is_constant_flat(axes)
        _write_labels(axes, ends, height=200)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("iteration")
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Mean over seeds, band from least to greatest, {SMOOTHING}-iteration moving average",
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
        runs: as for `training_curves`; one panel per label that trained, on common axes.
    """
    trained = [(i, label, seeds) for i, (label, seeds) in enumerate(runs.items()) if any(seeds)]
    columns = min(4, max(1, len(trained)))
    rows = max(1, -(-len(trained) // columns))
    figure = Figure(figsize=(3.4 * columns, 3.0 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (index, label, seeds) in zip(all_axes, trained):
        steps = [step for steps in seeds for step in steps]
        rewards = [step.get("reward/mean", math.nan) for step in steps]
        entropies = [step.get("entropy/perceptual", math.nan) for step in steps]
        spread = np.exp(entropies)
        color = style_of(index)["color"]
        mark(index, "point", axes.scatter(spread, rewards, s=6, alpha=0.4, color=color, lw=0))
        fit = exponential_fit(rewards, entropies)
        title = _shown(label)
        if math.isfinite(fit.a):
            ends = np.array([np.nanmin(spread), np.nanmax(spread)])
            axes.plot(ends, -fit.a * ends + fit.b, color="black", lw=1)
            title += f"\na = {fit.a:.3g}, b = {fit.b:.3g}, R² = {fit.r2:.2f}"
        axes.set_title(title, fontsize=8)
        axes.grid(alpha=0.3)
    for axes in all_axes[len(trained) :]:
        axes.set_visible(False)
    figure.supxlabel("exp(perceptual entropy)")
    figure.supylabel("reward")
    return figure


def quality_diversity(rows: Sequence[Row]) -> Figure:
    """The two normalised averages of each row, their 95% intervals, and the Pareto front.

    Args:
        rows: normalised.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
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
    points = {i: (row.label, (quality[i], diversity[i])) for i, row in enumerate(rows)}
    _write_labels(axes, points, height=400)
    axes.set_xlabel("quality, normalised average")
    axes.set_ylabel("diversity, normalised average")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
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


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Places in 0..1, at least `gap` apart in the order in which they were, each near its own.

    Args:
        places: [N], in any order.
        gap: wanted between two; less where N of them have no room.

    Returns:
        [N], in the order of `places`.

    Those that touch are a block about the mean of where its members want to be, as in isotonic
    regression.
    """
    gap = min(gap, 1 / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[list[float]] = []  # each [sum of (wanted - offset), members]
    for rank, index in enumerate(order):
        blocks.append([places[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, members = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += members
    low, high = 0.0, 1 - gap * (len(places) - 1)
    starts = [min(max(total / n, low), high) for total, n in blocks for _ in range(int(n))]
    result = [0.0] * len(places)
    for rank, index in enumerate(order):
        result[index] = starts[rank] + rank * gap
    return result


def _keep_what_is_constant_flat(axes: Axes) -> None:
    """Rounding errors do not fill an axis: it spans at least 1% of what it shows."""
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    half = max((high - low) / 2, 0.005 * abs(middle))
    axes.set_ylim(middle - half, middle + half)
    axes.ticklabel_format(axis="y", useOffset=False)


def _write_labels(
    axes: Axes, points: Mapping[int, tuple[str, tuple[float, float]]], height: float
) -> None:
    """Writes the label of each point at the right edge, with a line that leads to it.

    Args:
        axes: whose limits are as they will be.
        points: row index -> (label, point in data coordinates).
        height: of the axes, about, in points.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    wanted = [(y - low) / (high - low) for _, (_, y) in points.values()]
    heights = spread_out(wanted, 1.3 * LABEL_SIZE / height)
    for (index, (label, point)), place in zip(points.items(), heights):
        text = axes.annotate(
            _shown(label),
            xy=point,
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=LABEL_SIZE,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.7,
                "alpha": 0.7,
                "shrinkA": 1,
                "shrinkB": 1,
                "color": style_of(index)["color"],
            },
        )
        mark(index, "label", text, text.arrow_patch)


def _shown(label: str) -> str:
    """A label as matplotlib shows it as it is: `$` begins no formula, `_` hides none."""
    clean = one_line(label)
    if len(clean) > LABEL_LENGTH:
        clean = clean[: LABEL_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return ("" if clean[:1] != "_" else " ") + clean.replace("$", r"\$")


def _point(axes: Axes, row: Row, index: int) -> None:
    x, y = (student_interval(list(row.values[name].values())) for name in (QUALITY, DIVERSITY))
    line, caps, bars = axes.errorbar(
        x.mean,
        y.mean,
        xerr=None if math.isnan(x.half) else x.half,
        yerr=None if math.isnan(y.half) else y.half,
        fmt="osDv"[index // len(COLOURS) % 4],
        color=COLOURS[index % len(COLOURS)],
        elinewidth=0.8,
        alpha=0.9,
    )
    mark(index, "point", line)
    mark(index, "label", *caps, *bars)
