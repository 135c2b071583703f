"""The training loop: it learns, and an interrupted run ends where an unbroken one ends."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes.pretraining.loop import Recipe, Session, fit, load_tree, save_tree

RECIPE = Recipe("line", steps=60, learning_rate=0.1, log_every=10, ema_decay=0.9, warmup=5)


def draw(key):
    x = jax.random.normal(key, (16, 3))
    return x, x @ jnp.array([1.0, -2.0, 0.5])


def loss(params, ema, extra, batch, key):
    x, y = batch
    error = x @ params["w"] - y + 0.01 * jax.random.normal(key, y.shape)
    return jnp.mean(error**2), ({"seen": extra}, extra + 1.0)


class Interrupted(Exception):
    pass


def run(tmp_path, draw=draw, **kwargs):
    session = Session(tmp_path / "out", tmp_path / "state", **kwargs)
    return fit(session, RECIPE, loss, {"w": jnp.zeros(3)}, draw, extra=jnp.zeros(()))


def test_fit_finds_the_line_and_carries_the_extra_state(tmp_path):
    state = run(tmp_path)
    np.testing.assert_allclose(state.ema["w"], [1.0, -2.0, 0.5], atol=0.2)
    assert int(state.step) == 60
    assert float(state.extra) == 60.0
    assert len((tmp_path / "state" / "log.jsonl").read_text().splitlines()) == 6


def test_the_time_of_interrupted_processes_counts_and_that_of_discarded_ones_does_not(tmp_path):
    session = Session(tmp_path, tmp_path)
    assert session.earlier_seconds("a") == 0.0
    rows = [
        ("a", 10, 5.0),  # discarded
        ("a", 10, 1.0),
        ("a", 20, 2.0),
        ("b", 10, 9.0),
        ("a", 20, 0.5),  # resumed
        ("a", 30, 1.5),
        ("a-tuned", 10, 4.0),
        ("a_b", 10, 9.0),
    ]
    lines = [json.dumps({"stage": n, "step": step, "seconds": s}) for n, step, s in rows]
    session.log_path.write_text("\n".join(lines) + "\n")
    assert session.earlier_seconds("a") == 2.0 + 1.5 + 4.0


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    calls = []

    def failing(key):
        calls.append(key)
        if len(calls) > 35:
            raise Interrupted
        return draw(key)

    with pytest.raises(Interrupted):
        run(tmp_path / "broken", failing, snapshot_seconds=0.0)
    resumed = run(tmp_path / "broken")
    assert len(calls) == 36  # the first run came past its third snapshot
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_seed_and_scale_change_the_run(tmp_path):
    one = run(tmp_path / "a", seed=1)
    assert not np.array_equal(one.params["w"], run(tmp_path / "b", seed=2).params["w"])
    assert int(run(tmp_path / "c", steps_scale=0.5).step) == 30


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path):
    with pytest.raises(FloatingPointError, match="line"):
        run(tmp_path, lambda key: (jnp.full((16, 3), jnp.nan), jnp.zeros(16)))


def test_a_snapshot_of_another_tree_is_refused_by_name(tmp_path):
    save_tree(tmp_path / "s.safetensors", {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"'w'.*\(4,\)"):
        load_tree(tmp_path / "s.safetensors", {"w": jnp.zeros(4)})


def test_finished_stage_keeps_its_numbers_and_drops_snapshots(tmp_path):
    session = Session(tmp_path, tmp_path / "state")
    assert session.numbers("line") is None
    (tmp_path / "state").mkdir()
    save_tree(tmp_path / "state" / "line.safetensors", {"w": jnp.zeros(3)})
    session.finish("line", {"loss": 1.5})
    assert session.numbers("line") == {"loss": 1.5}
    assert not list((tmp_path / "state").glob("*.safetensors"))


def test_stages_draw_from_different_keys(tmp_path):
    session = Session(tmp_path, tmp_path)
    other = dataclasses.replace(session, seed=1)
    keys = [session.key("clip"), session.key("dino"), other.key("clip")]
    assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == 3
