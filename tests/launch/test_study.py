"""The study: its rows are the paper's, its overrides exist, its claims are computed right."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from pec_jax.config.registry import CONSTRAINTS
from pec_jax.config.schema import from_config_dict, to_dict
from pec_jax.evaluation.table import Row, normalise
from pec_jax.training.metric_writer import image_grid


def shapes_study():
    from configs import shapes_study

    return shapes_study.get_config()


LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def study():
    """launch/ is not a package: its files find each other through the path, as when run."""
    sys.path.insert(0, str(LAUNCH))
    try:
        yield importlib.import_module("study")
    finally:
        sys.path.remove(str(LAUNCH))


@pytest.fixture(scope="module")
def claims(study):
    return sys.modules["study_claims"]


def test_every_constraint_has_a_row(study):
    assert {method.name for method in study.METHODS} == {"none", *CONSTRAINTS}
    by_name = [(method.name, method.space) for method in study.METHODS]
    for name in ("entropy_reg", "clip_cov", "kl_cov"):
        assert {(name, "latent"), (name, "pickscore")} <= set(by_name)
    for name in ("pec", "pcvae"):
        assert {(name, "dino"), (name, "pickscore")} <= set(by_name)


def test_every_method_is_tuned_by_as_many_values(study):
    assert {len(method.grid) for method in study.METHODS[1:]} == {3}
    jobs = study.tuning_jobs(Path("runs"))
    assert all(
        dict(job.overrides)["seed"] == study.TUNING_SEED
        for v in jobs.values()
        for job in v.values()
    )
    assert study.TUNING_SEED not in study.SEEDS


def test_tuning_runs_are_as_long_as_reported_ones_and_see_other_prompts(study):
    tuned = [job for values in study.tuning_jobs(Path("runs")).values() for job in values.values()]
    chosen = {method.label: list(method.grid) for method in study.METHODS}
    reported = study.reported_jobs(Path("runs"), "pickscore", study.METHODS, chosen, study.SEEDS)
    for job in [*tuned, *reported]:
        assert "num_iterations" not in dict(job.overrides)
    assert {dict(job.overrides)["prompts.heldout"] for job in tuned} == {"shapes/tuning_open"}
    assert not any("prompts.heldout" in dict(job.overrides) for job in reported)


def test_every_override_is_a_field_of_the_config(study):
    from configs import shapes_study

    for method in (*study.METHODS, *study.ESTIMATORS):
        for value in method.grid or ("",):
            config: ConfigDict = shapes_study.get_config()
            made = study.job(Path("runs"), "3", "attributes", method, value)
            for field, text in made.overrides:
                *path, last = field.split(".")
                section = config
                for name in path:
                    section = section[name]
                section[last] = type(section[last])(text)
            sections = from_config_dict(config).constraints
            on = [name for name, options in sections.items() if CONSTRAINTS[name].is_on(options)]
            beside = {field.split(".")[1] for field, _ in method.extra if "kl.weight" in field}
            assert set(on) == {method.name, *beside} - {"none"}
            weights = {name: config.rewards[name].weight for name in config.rewards}
            assert {name for name, weight in weights.items() if weight} == {"attributes"}
            assert config.rewards.pickscore.evaluate and config.rewards.clip.evaluate


def test_directories_do_not_collide(study):
    jobs = [j for v in study.tuning_jobs(Path("runs")).values() for j in v.values()]
    assert len({job.directory for job in jobs}) == len(jobs)


def test_the_first_seed_of_what_is_shown_draws_pictures(study, tmp_path):
    chosen = {method.label: list(method.grid) for method in study.METHODS}
    jobs = study.reported_jobs(tmp_path, "pickscore", study.METHODS, chosen, ("0", "1"))
    drawing = [job for job in jobs if "schedule.sample_every" in dict(job.overrides)]
    assert [job.directory.name.split("_")[0] for job in drawing] == list(study.SHOWN)
    measured = [job for job in jobs if "schedule.eval_every" in dict(job.overrides)]
    assert len(measured) == 2 * len(study.SHOWN)
    for job in drawing:
        for step in ("0", "60"):
            path = job.directory / "samples" / f"step_{step:>06}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{job.directory.name} {step}")
    study.copy_grids(jobs, tmp_path)
    assert (tmp_path / "base.png").read_text().endswith(" 0")
    assert (tmp_path / "pec.png").read_text() == f"{drawing[-1].directory.name} 60"


def test_the_detail_of_a_grid_is_its_first_columns(study, tmp_path):
    images = np.linspace(0.0, 1.0, 2 * 9)[:, None, None, None] * np.ones((64, 64, 3))
    image_grid(images.reshape(2, 9, 64, 64, 3), ["one", "two"]).save(tmp_path / "grid.png")
    study.first_columns(tmp_path / "grid.png", tmp_path / "detail.png")
    detail = np.asarray(Image.open(tmp_path / "detail.png"))
    assert detail.shape == (2 * 166, 2 * 398, 3)
    middles = detail[100, 2 * (2 + 32) :: 2 * 66, 0]
    np.testing.assert_array_equal(middles, np.round(images[:6, 0, 0, 0] * 255))
    assert detail[100, -1].min() > 240  # white, as between two, but for the filter's ringing


def test_the_best_values_come_first(study):
    assert study.ranked({"pec": {"1": 0.2, "2": 0.9, "3": 0.5}}) == {"pec": ["2", "3", "1"]}


def test_how_well_a_target_is_held(claims, tmp_path):
    lines = [
        {
            "step": i + 1,
            "reward/mean": 1.0,
            "constraint/pec_target/target": 0.5,
            "entropy/perceptual": h,
        }
        for i, h in enumerate([9.0] * claims.WARM_UP + [0.4, 0.5, 0.9])
    ]
    text = "".join(json.dumps(line) + "\n" for line in [{"step": 1, "quality/a": 1.0}, *lines])
    (tmp_path / "metrics.jsonl").write_text(text)
    held = claims.target_held(tmp_path)
    assert held["mean"] == pytest.approx(0.6)
    assert held["relative"] == pytest.approx(0.2)
    assert held["spread"] == pytest.approx(np.exp(0.1) - 1)


def test_pairs_of_seeds_are_compared_as_scipy_does(claims):
    """Witness: the one-sample test of the differences, 1, 2 and 3: t = 2 / (1 / sqrt(3))."""
    found = claims.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.difference == pytest.approx(2.0)
    assert found.effect == pytest.approx(2.0)
    t = 2.0 * np.sqrt(3.0)  # with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    assert found.p == pytest.approx(1.0 - t / np.sqrt(t**2 + 2.0))


def test_holm_adjusts_for_the_number_of_comparisons(claims):
    """.01 counts three times, .03 twice, .04 once but never less than what came before."""
    np.testing.assert_allclose(claims.holm([0.03, 0.01, 0.04]), [0.06, 0.03, 0.06])
    assert claims.holm([0.9, 0.8]) == [1.0, 1.0]


def run_of(seed, **numbers):
    base = {
        "quality/finish": 0.4,
        "quality/attributes": 0.5,
        "quality/pickscore": 1.0,
        "quality/hps": 2.0,
        "diversity/attributes": 0.9,
        "diversity/variance_dino": 0.5,
        "diversity/variance_clip": 0.5,
    }
    after = base | {name.replace("__", "/"): value for name, value in numbers.items()}
    evaluation = after | {f"base/{name}": value for name, value in base.items()}
    return types.SimpleNamespace(seed=seed, evaluation=evaluation)


def test_shares_kept_are_of_the_base_and_gains_of_grpo_with_the_same_seed(claims):
    better = {"quality__attributes": 0.7, "quality__pickscore": 2.0, "quality__hps": 3.0}
    runs_of = {
        "Flow-GRPO": [
            run_of("0", quality__finish=0.8, diversity__attributes=0.45, **better),
            run_of("1", quality__finish=0.6, diversity__attributes=0.45, **better),
        ],
        "PEC": [
            run_of("0", quality__finish=0.6, **better),  # half of seed 0's gain
            run_of("1", quality__finish=0.5, **better),  # half of seed 1's
        ],
    }
    text = claims.what_is_kept(runs_of)
    assert "| Flow-GRPO | 50 ± 0 | 100 ± 0 | 100 ± 0 | 100 ± 0 |" in text
    assert "| PEC | 100 ± 0 | 100 ± 0 | 100 ± 0 | 50 ± 0 |" in text
    assert "| PEC | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in claims.two_judges(runs_of)


def test_both_at_once_means_both(claims):
    def row(name, quality, diversity):
        return Row(name, "", "", {"quality/a": {"0": quality}, "diversity/b": {"0": diversity}})

    rows = normalise([row("Base", 0, 2), row("Flow-GRPO", 2, 0), row("X", 2, 2), row("Y", 3, 1)])
    assert claims.both_at_once(rows).endswith("differences: X.")
    assert claims.both_at_once(rows[:2]).endswith("differences: none.")


def test_within_one_standard_error_is_not_below(claims):
    def row(*values):
        return Row("", "", "", {"m": {str(seed): value for seed, value in enumerate(values)}})

    assert claims._not_below(row(1.0, 2.0), row(1.1, 2.05), "m") is False  # -.075 +- .025
    assert claims._not_below(row(1.0, 2.0), row(1.3, 1.8), "m") is True  # -.05 +- .25


def test_the_estimators_ranks(claims, tmp_path):
    directories = []
    for i in range(4):
        directory = tmp_path / str(i)
        directory.mkdir()
        numbers = {"diversity/vendi_": i, "diversity/pairwise_l2_": -i}
        numbers |= {"entropy/gaussian_": i, "entropy/logdet_": i**2, "entropy/knn_": -i}
        spaces = ("dino", "clip", "pickscore")
        values = {name + space: value for name, value in numbers.items() for space in spaces}
        (directory / "eval.json").write_text(json.dumps(values))
        directories.append(directory)
    text = claims.estimator_ranks(directories)
    assert "| gaussian, dino | 1.000 | 1.000 | -1.000 | 1.000 | -1.000 |" in text


def test_archived_runs_come_back_as_finished_ones(study, tmp_path):
    archive = sys.modules["study_archive"]
    run = tmp_path / "runs" / "pickscore" / "none_seed=0"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(to_dict(from_config_dict(shapes_study()))))
    (run / "eval.json").write_text('{"quality/a": 0.123456789}')
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 2.5}\n{"step": 2}\n')
    (run / "checkpoint").write_text("large")
    unfinished = tmp_path / "runs" / "pickscore" / "none_seed=1"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")

    archive.pack(tmp_path / "runs", tmp_path)
    archive.unpack(tmp_path, tmp_path / "again")

    again = tmp_path / "again" / "pickscore"
    assert sorted(p.name for p in again.iterdir()) == ["none_seed=0"]
    assert json.loads((again / run.name / "eval.json").read_text()) == {"quality/a": 0.12346}
    steps = (again / run.name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]
    assert not (again / run.name / "checkpoint").exists()


def test_runs_of_an_earlier_version_are_refused_before_any_training(study, tmp_path, capsys):
    run = tmp_path / "runs" / "pickscore" / "none_seed=0"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"seed": 0, "constraint": {"name": "none"}}')
    with pytest.raises(SystemExit, match=r"config.json was written by an earlier"):
        study.check(tmp_path / "runs")
    (run / "eval.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    sys.modules["study_archive"].pack(tmp_path / "runs", tmp_path)
    with pytest.raises(SystemExit, match=r"runs.tar.xz/.* by an earlier version"):
        study.check(tmp_path / "new", archive=tmp_path)
    assert not (tmp_path / "new").exists()


def test_the_parameters_chosen_before_are_of_todays_methods(study):
    """`--quick` reads them from a file that an earlier version wrote."""
    chosen = study.chosen_before()
    for method in (*study.METHODS, *study.ESTIMATORS):
        assert not method.grid or set(chosen[method.label]) == set(method.grid)
