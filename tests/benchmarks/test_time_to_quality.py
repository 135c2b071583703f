"""When a run is there, at what cost; what is kept of it, also when it is interrupted."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import arrivals, recipes, time_to_quality
from benchmarks.arrivals import Curve, arrival, first_reached, target_of
from benchmarks.time_to_quality import length

ALL, OTHER = recipes.REFERENCE.name, "window of 2, from step 0"


def curve(recipe=ALL, seed="0", quality=(0.5, 0.7, 0.9), flops=100, **more) -> Curve:
    fields = {"iterations": [0, 10, 20], "diversity": [0.8, 0.6, 0.4], "seconds": 2.0, **more}
    return Curve(recipe=recipe, seed=seed, quality=list(quality), flops=flops, **fields)


@pytest.mark.parametrize("recipe", recipes.all_recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_is_a_config(recipe):
    config = recipes.config_of(recipe)
    assert config.batch.groups * config.batch.group_size == 96
    assert (config.constraints["pec"].weight > 0) == recipe.name.endswith("+ PEC")


def test_names_are_distinct_as_directories():
    labels = [recipe.label for recipe in recipes.all_recipes()]
    assert len(set(labels)) == len(labels)


def test_fewer_trained_steps_cost_less():
    """Of six steps of rollout, five of them trained at three to four passes each, or one."""
    window = recipes.cost(recipes.RECIPES[1])
    assert 0.4 < window / recipes.cost(recipes.REFERENCE) < 0.7


def test_a_run_has_the_flops_of_the_reference():
    assert length(100, 100) == 60
    assert length(80, 100) == 75
    assert length(20, 100) == 120  # at most


def test_the_line_between_evaluations():
    assert first_reached([0, 10, 20], [0.0, 1.0, 2.0], 1.5) == 15
    assert first_reached([0, 10, 20, 30], [0.0, 2.0, 1.0, 2.0], 1.5) == 7.5  # the first time
    assert math.isnan(first_reached([0, 10], [0.0, 1.0], 1.5))


def test_the_target_is_nine_tenths_of_the_references_mean_gain():
    seeds = [curve(quality=(0.5, 0.7, 0.9)), curve(seed="1", quality=(0.5, 0.7, 0.8))]
    assert target_of([*seeds, curve(OTHER)]) == pytest.approx(0.5 + 0.9 * 0.35)


def test_cost_and_diversity_on_arrival():
    found = arrival(curve(), 0.8)
    assert found.iterations == pytest.approx(15)
    assert (found.flops, found.seconds) == (pytest.approx(1500), pytest.approx(30))
    assert found.diversity == pytest.approx(0.5 / 0.8)
    assert math.isnan(arrival(curve(), 0.95).flops)


def test_the_table_says_who_did_not_arrive():
    found = arrivals.by_recipe([curve(OTHER, flops=50), curve(), curve(seed="1")])
    assert list(found) == [ALL, OTHER]  # in the order of the recipes
    table = arrivals.write_table(found, 0.8).splitlines()
    assert table[2].startswith(f"| {ALL} | 15.0 ± 0.0 | 0.00 ± 0.00 | 1.00 ± 0.00 | 30 ± 0 |")
    assert table[3].startswith(f"| {OTHER} | 15.0 | 0.00 | 0.50 | 30 | 0.62 | 0.900 | 0.50 | 1 of")
    assert "| – |" in arrivals.write_table(found, 0.95)
    assert arrivals.draw(found, 0.8).axes


def test_what_has_finished_is_kept_when_the_rest_is_interrupted(tmp_path, monkeypatch):
    def run(jobs, parallel):
        assert parallel == 2
        for job in jobs[:3]:
            job.directory.mkdir(parents=True)
            steps = [{"step": i, "reward/mean": 0.5, "time/step_seconds": 1.5} for i in (1, 2)]
            way = {"step": 1, "count/prompts": 24, "quality/pickscore": 0.6}
            lines = [*steps, way | {"diversity/attributes": 0.7}]
            (job.directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
            ends = {"quality/pickscore": 0.7, "diversity/attributes": 0.6}
            base = {f"base/{name}": 0.8 for name in ends}
            length = int(dict(job.overrides)["num_iterations"])
            (job.directory / "eval.json").write_text(
                json.dumps(ends | base | {"iterations": length})
            )
        raise SystemExit("Stopped.")

    monkeypatch.setattr(time_to_quality.runner, "run_jobs", run)
    monkeypatch.setattr(recipes, "cost", lambda recipe: 100)
    curves = {}
    with pytest.raises(SystemExit):
        time_to_quality.train(curves, tmp_path, ["0", "1"], 2)
    assert [c.recipe for c in curves.values()] == [ALL, f"{ALL} + PEC", recipes.RECIPES[1].name]
    first = next(iter(curves.values()))
    assert (first.iterations, first.quality, first.seconds) == ([0, 1, 60], [0.8, 0.6, 0.7], 1.5)
    path = tmp_path / "curves.json"
    arrivals.write_curves(curves, path)
    assert arrivals.read_curves(path) == curves

    def rest(jobs, parallel):
        names = {job.directory.name for job in jobs}
        assert not names & set(curves)
        assert len(names) == 2 * len(recipes.all_recipes()) - 3
        return []

    monkeypatch.setattr(time_to_quality.runner, "run_jobs", rest)
    time_to_quality.train(curves, tmp_path, ["0", "1"], 2)
