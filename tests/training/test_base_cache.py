"""What an evaluation of the base model is kept under, and that it is the same when taken up."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pec_jax.config import from_config_dict
from pec_jax.evaluation.metrics import Moments
from pec_jax.training import base_cache
from pec_jax.training import trainer as train_lib
from pec_jax.training.evaluator import Evaluation
from tests.conftest import small_config_dict


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEC_JAX_CACHE", str(tmp_path / "cache"))


def with_config(experiment, change):
    values = small_config_dict()
    change(values)
    return dataclasses.replace(experiment, config=from_config_dict(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update({"num_iterations": 7}),
        lambda c: c.constraints.pec.update({"weight": 3.0}),
        lambda c: c.optimizer.update({"learning_rate": 1e-4}),
        lambda c: c.batch.update({"groups": 4}),
    ],
)
def test_what_training_alone_reads_changes_nothing(experiment, change):
    """A sweep over a method evaluates its base once."""
    same = with_config(experiment, lambda c: None)
    assert base_cache.place(with_config(experiment, change)) == base_cache.place(same)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update({"seed": 5}),
        lambda c: c.eval.update({"num_steps": 7}),
        lambda c: c.eval.update({"guidance": 2.0}),
        lambda c: c.sampler.update({"noise_level": 0.9}),  # of the bandwidth of estimators
        lambda c: c.perception.update({"k": 2}),
        lambda c: c.rewards.hps.update({"evaluate": not c.rewards.hps.evaluate}),
    ],
)
def test_what_an_evaluation_reads_is_told_apart(experiment, change):
    same = with_config(experiment, lambda c: None)
    assert base_cache.place(with_config(experiment, change)) != base_cache.place(same)


def test_arrays_are_told_apart_by_their_content(experiment):
    first = base_cache.place(experiment)
    copied = dataclasses.replace(experiment, params=jax.tree.map(np.array, experiment.params))
    assert base_cache.place(copied) == first
    leaves, treedef = jax.tree.flatten(experiment.frozen)
    changed = np.array(leaves[-1])
    changed.flat[0] += 1
    frozen = jax.tree.unflatten(treedef, [*leaves[:-1], changed])
    assert base_cache.place(dataclasses.replace(experiment, frozen=frozen)) != first


def test_large_models_and_foreign_judges_are_not_kept(experiment, monkeypatch):
    names = {"somebody's": next(iter(experiment.rewards.rewards.values()))}
    foreign = dataclasses.replace(experiment.rewards, rewards=names)
    monkeypatch.setattr(
        base_cache.REWARDS,
        "_entries",
        {"somebody's": dataclasses.make_dataclass("D", ["origin"])("x")},
    )
    assert base_cache.place(dataclasses.replace(experiment, rewards=foreign)) is None
    monkeypatch.undo()
    monkeypatch.setattr(base_cache, "MAX_BYTES", 1000)
    assert base_cache.place(experiment) is None
    assert base_cache.read(None) is None
    base_cache.write(None, Evaluation({}, {}))


def test_what_is_kept_comes_back_and_the_oldest_go(experiment, monkeypatch):
    place = base_cache.place(experiment)
    kept = Evaluation({"quality/a": 0.1}, {"dino": Moments(np.ones(3), np.eye(3))})
    base_cache.write(place, kept)
    found = base_cache.read(place)
    assert found.numbers == kept.numbers
    np.testing.assert_array_equal(found.moments["dino"].covariance, np.eye(3))
    monkeypatch.setattr(base_cache, "KEPT", 2)
    for name in ("b", "c"):
        base_cache.write(place.parent / name, kept)
    assert sorted(path.name for path in place.parent.iterdir()) == ["b", "c"]


def test_a_damaged_one_is_none_and_a_full_disk_is_no_error(experiment, monkeypatch, caplog):
    place = base_cache.place(experiment)
    kept = Evaluation({"quality/a": 0.1}, {"dino": Moments(np.ones(3), np.eye(3))})
    base_cache.write(place, kept)
    (place / "eval_base.safetensors").write_bytes(b"cut short")
    assert base_cache.read(place) is None

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_cache.base_evaluation, "write", full)
    base_cache.write(place, kept)


def test_a_second_run_takes_it_up_and_says_the_same(tmp_path):
    config = small_config_dict()
    config.num_iterations = 1
    config.eval.entropy_probes = 0
    first = train_lib.train(config, tmp_path / "first")
    made = list((tmp_path / "cache" / "base_evaluations").iterdir())
    assert len(made) == 1
    written = made[0].stat().st_mtime_ns
    config.constraints.pec.weight = 1.0
    second = train_lib.train(config, tmp_path / "second")
    assert list((tmp_path / "cache" / "base_evaluations").iterdir()) == made
    assert made[0].stat().st_mtime_ns == written
    base = {name: value for name, value in first.items() if name.startswith("base/")}
    assert base == {name: second[name] for name in base}
    bytes_of = [(tmp_path / n / "eval_base.safetensors").read_bytes() for n in ("first", "second")]
    assert bytes_of[0] == bytes_of[1]
