"""The figures: what they show, and that they can be drawn from little."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from scipy import optimize

from pec_jax.evaluation import figures, table
from pec_jax.evaluation.steps import read_evaluations
from tests.evaluation.test_table import row

RNG = np.random.default_rng(0)


def steps(count=12, slope=1.0):
    return [
        {
            "step": i + 1,
            "reward/mean": slope * i,
            "reward/std": 1.0,
            "entropy/policy": 0.8,
            "entropy/perceptual": float(RNG.normal()),
            "diversity/variance_perceptual": 0.3,
            "diversity/variance_pixel": 5.0,
        }
        for i in range(count)
    ]


def test_the_pareto_front_is_what_no_point_beats():
    for _ in range(20):
        quality, diversity = RNG.integers(0, 6, size=(2, 15)).astype(float)
        front = figures.pareto_front(quality, diversity)
        for i in range(15):
            beaten = any(
                quality[j] >= quality[i]
                and diversity[j] >= diversity[i]
                and (quality[j], diversity[j]) != (quality[i], diversity[i])
                for j in range(15)
            )
            assert (i in front) != beaten
        assert list(diversity[front]) == sorted(diversity[front], reverse=True)


def test_smoothing_keeps_lines_and_means():
    np.testing.assert_allclose(figures.smooth([2.0] * 9), 2.0)
    line = np.arange(20.0)
    np.testing.assert_allclose(figures.smooth(line)[3:-3], line[3:-3])
    gaps = figures.smooth([1.0, np.nan, 3.0], width=3)
    np.testing.assert_allclose(gaps, [1.0, 2.0, 3.0])
    assert np.isnan(figures.smooth([np.nan] * 3)).all()


def test_no_two_rows_look_alike():
    styles = [tuple(figures.style_of(i).values()) for i in range(32)]
    assert len(set(styles)) == 32


def test_training_curves_are_means_with_bands():
    figure = figures.training_curves({"a": [steps(), steps(10, slope=3.0)], "b": [steps()]})
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata()[4:6], [2 * 4, 2 * 5])
    assert len(axes.lines[0].get_xdata()) == 10
    assert len(axes.collections) == 2
    assert [text.get_text() for text in axes.texts] == ["a", "b"]
    assert all(line.get_gid() == f"row-{i}-curve" for i, line in enumerate(axes.lines))


def test_a_label_keeps_its_colour_where_another_did_not_train():
    figure = figures.training_curves({"base": [], "a": [steps()]})
    line = figure.axes[0].lines[0]
    assert (line.get_color(), line.get_gid()) == (figures.style_of(1)["color"], "row-1-curve")
    dots = figures.reward_entropy({"base": [], "a": [steps()]}).axes[0].collections[0]
    assert dots.get_gid() == "row-1-point"


def test_rounding_errors_do_not_fill_an_axis():
    made = steps()
    for i, step in enumerate(made):
        step["entropy/policy"] = 1.0 + 1e-7 * i
    axes = figures.training_curves({"a": [made]}).axes[2]
    low, high = axes.get_ylim()
    assert axes.get_title().startswith("policy entropy") and high - low >= 0.01


def test_labels_are_spread_out():
    """In order, apart, inside, and as near as that allows: against a solver of such problems."""
    for count in (1, 2, 3, 8, 19):
        for _ in range(20):
            places = RNG.random(count) ** 3
            gap = 0.04
            found = np.array(figures.spread_out(places, gap))
            order = np.argsort(places)
            assert (np.diff(found[order]) >= gap - 1e-9).all()
            assert found.min() >= -1e-9 and found.max() <= 1 + 1e-9
            matrix = np.eye(count)
            inside = optimize.LinearConstraint(matrix, 0, 1)
            apart = [optimize.LinearConstraint(np.diff(matrix, axis=0), gap, np.inf)]
            best = optimize.minimize(
                lambda x, wanted=places[order]: ((x - wanted) ** 2).sum(),
                np.linspace(0, 1, count),
                constraints=[inside, *(apart if count > 1 else [])],
                method="SLSQP",
                options={"ftol": 1e-12},
            )
            np.testing.assert_allclose(found[order], best.x, atol=1e-4)
    np.testing.assert_allclose(np.diff(figures.spread_out([0.5] * 41, 0.1)), 1 / 40)


def test_reward_against_entropy_names_the_fit():
    made = steps()
    for step in made:
        step["reward/mean"] = -2.0 * np.exp(step["entropy/perceptual"]) + 1.0
    figure = figures.reward_entropy({"run": [made]})
    assert "a = 2, b = 1, R² = 1.00" in figure.axes[0].get_title()


@pytest.mark.parametrize("seeds", ["0", "012"])
def test_the_scatter_has_every_row_and_the_front(seeds):
    rows = table.normalise([row("a", 1, 3, seeds), row("b", 2, 2, seeds), row("c", 1, 1, seeds)])
    figure = figures.quality_diversity(rows)
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b", "c"]
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "Pareto front"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_labels_are_drawn_as_they_are(recwarn):
    """What matplotlib takes for formulas, escapes and names to hide."""
    names = [r"$\frac{1}{$", "$x$", r"\$5", "_hidden", "%s {0}", "x" * 34]
    rows = table.normalise([row(name, i, -i) for i, name in enumerate(names)])
    drawn = {name: [steps()] for name in names}
    for figure in (
        figures.quality_diversity(rows),
        figures.training_curves(drawn),
        figures.reward_entropy(drawn),
    ):
        figure.savefig(io.BytesIO(), format="png", dpi=30)
    texts = figures.quality_diversity(rows).axes[0].texts
    shown = [figures._shown(name) for name in names]
    assert [text.get_text() for text in texts] == shown
    # What matplotlib makes of them in the end, which only its renderer says.
    assert [text._preprocess_math(text.get_text())[0].strip() for text in texts] == names
    assert not any(text._preprocess_math(text.get_text())[1] for text in texts)
    assert not [w for w in recwarn if "legend" in str(w.message)]


def test_empty_runs_are_drawn_without_a_stack_trace():
    figures.training_curves({"a": [[]]}).savefig(io.BytesIO(), format="png")
    figures.reward_entropy({}).savefig(io.BytesIO(), format="png")


def test_evaluations_are_drawn_from_the_base_to_the_end(tmp_path):
    (tmp_path / "eval.json").write_text(
        json.dumps({"quality/a": 3.0, "base/quality/a": 1.0, "distance/b": 0.5, "iterations": 20})
    )
    lines = [
        {"step": 5, "reward/mean": 1.0},
        {"step": 10, "quality/a": 2.0, "distance/b": 0.2, "count/prompts": 8},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_evaluations(tmp_path)
    assert [line["step"] for line in found] == [0, 10, 20]
    assert [line["quality/a"] for line in found] == [1.0, 2.0, 3.0]
    assert [line["distance/b"] for line in found] == [0.0, 0.2, 0.5]
    panels = (("quality/a", "quality"), ("distance/b", "distance"))
    figure = figures.spread_and_distance({"x": [found, found]}, panels)
    assert [axes.get_title() for axes in figure.axes] == ["quality", "distance"]
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), [0.0, 0.2, 0.5])
