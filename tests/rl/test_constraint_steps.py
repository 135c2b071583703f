"""Every constraint inside the update, per-step surprisals, sums of encoders, the dual variable."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.config import ConfigError, from_config_dict
from pec_jax.rl import train_step as steps
from pec_jax.rl.constraints import CONSTRAINTS
from pec_jax.training import trainer as train_lib
from pec_jax.training.build import make_world, perception_spaces
from tests.conftest import small_config_dict
from tests.rl.test_train_step import changed, make_state, run_update


@pytest.fixture(scope="module")
def experience(world):
    """(state, batch, rollout with predictions) of a policy that is not the base model's."""
    state, batch = make_state(world, noise=0.05), world.train.gather([0, 1])
    program = changed(world, perception={"at": "steps"})

    @jax.jit
    def run(state, frozen, batch, key):
        trajectory = steps.rollout(program, state.params, frozen, batch, key)
        return steps.score(program, frozen, batch, trajectory)

    return state, batch, run(state, world.frozen, batch, jax.random.key(1))


@pytest.fixture(scope="module")
def updated(world, experience):
    """constraint fields -> (state, metrics) after one rollout's two updates; cached."""
    state, batch, rollout = experience
    state = state.replace(constraint_weight=jnp.float32(0.5))

    @functools.cache
    def run(final=True, **fields):
        # A share of .8, for the batch has but 16 samples to draw from.
        fields = {"cov_share": 0.8, **fields}
        program = changed(world, constraint=fields, grpo={"minibatches": 2})
        taken = rollout.replace(surprisal=rollout.surprisal[-1]) if final else rollout
        return run_update(program, world, state, batch, taken)

    return run


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_every_constraint_trains(name, updated, experience):
    after, metrics = updated(name=name)
    values = {key: float(value) for key, value in metrics.items()}
    assert all(map(math.isfinite, values.values())), values
    assert not same(after.params, experience[0].params)
    assert values["policy/ratio_max_deviation"] == 0.0
    selects = CONSTRAINTS[name].select is not None
    assert (0 < values["constraint/selected"] < 1) == selects
    if name not in ("none", "clip_higher"):
        assert not same(after.params, updated(name="none")[0].params)


def test_the_exact_entropy_bonus_changes_nothing_bit_for_bit(updated):
    exact = updated(name="entropy_reg", space="latent", gradient="exact")
    assert same(exact[0].params, updated(name="none")[0].params)
    assert float(exact[1]["constraint/loss"]) != 0.0  # it is there; it has no gradient


def test_clip_higher_with_equal_bounds_is_none_bit_for_bit(updated):
    assert same(updated(name="clip_higher", clip_ratio=1.0)[0], updated(name="none")[0])


def test_a_surprisal_for_each_step_enters_that_steps_reward(updated, experience):
    per_step, metrics = updated(name="pec", final=False)
    assert not same(per_step.params, updated(name="pec")[0].params)
    expected = 0.5 * float(jnp.mean(experience[2].surprisal))
    np.testing.assert_allclose(metrics["constraint/bonus_mean"], expected, rtol=1e-5)


def test_surprisals_of_steps_are_those_of_the_decoded_predictions(world, experience):
    _, batch, rollout = experience
    program, config = world.program, world.config
    trained = program.trained_steps
    assert rollout.surprisal.shape == (len(trained), *rollout.rewards.shape)
    predictions = rollout.trajectory.x_0_hat[trained]
    for x_0_hat, found in zip(predictions, rollout.surprisal):
        images = program.decode(world.frozen.vae, x_0_hat)
        levels = jnp.round(images * 255) / 255
        features = program.features[config.perception.encoder](
            world.frozen.encoders[config.perception.encoder], levels
        )
        by_hand = program.surprisal({"dino": features.reshape(*rollout.rewards.shape, -1)})
        # A pixel on the edge of two 8-bit levels may fall to either side in another graph.
        np.testing.assert_allclose(found, by_hand, atol=5e-3)
    plain = jax.jit(functools.partial(steps.score, program))(
        world.frozen, batch, rollout.trajectory
    )
    name = "entropy/perceptual"
    np.testing.assert_allclose(rollout.metrics[name], plain.metrics[name], atol=1e-4)
    assert "entropy/perceptual_steps" in rollout.metrics


def test_a_sum_of_encoders_is_the_weighted_mean_of_their_surprisals():
    def surprisal(encoder):
        config = small_config_dict()
        config.perception.encoder = encoder
        return make_world(from_config_dict(config)).program.surprisal

    rng = np.random.default_rng(0)
    features = {
        name: jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32) for name in ("dino", "clip")
    }
    both = surprisal("dino + 0.5 * clip")(features)
    expected = (2 * surprisal("dino")(features) + surprisal("clip")(features)) / 3
    np.testing.assert_allclose(both, expected, rtol=1e-5)


@pytest.mark.parametrize("text", ["dino + dino", "-1 * dino", "", "x * dino", "dino +", "0*dino"])
def test_what_is_no_sum_of_encoders_is_refused(text):
    config = small_config_dict()
    config.perception.encoder = text
    with pytest.raises(ConfigError, match="a sum of"):
        perception_spaces(from_config_dict(config))


def test_a_sum_with_an_unknown_encoder_is_refused():
    config = small_config_dict()
    config.perception.encoder = "dino + nothing"
    with pytest.raises(ConfigError, match="nothing"):
        make_world(from_config_dict(config))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"name": "pcvae", "space": "latent"}, "means nothing in space 'latent'"),
        ({"name": "entropy_reg", "gradient": "exact"}, "in space 'latent' only"),
        ({"name": "pecc"}, "Did you mean 'pec'"),
    ],
)
def test_combinations_without_meaning_are_refused_before_anything_is_loaded(fields, words):
    config = small_config_dict()
    config.constraint.update(fields)
    with pytest.raises(ConfigError, match=words):
        make_world(from_config_dict(config))


def test_the_dual_variable_of_a_run(tmp_path):
    config = small_config_dict()
    config.num_iterations = 2
    config.perception.k = 1
    config.eval.entropy_probes = 1
    config.constraint.update(
        {"name": "pec_target", "weight": 0.7, "rate": 0.5, "target": 0.8, "base_batches": 1}
    )
    train_lib.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if "reward/mean" in line)
    assert first["constraint/target"] == second["constraint/target"]
    assert first["constraint/weight"] == pytest.approx(0.7)
    deficit = first["constraint/target"] - first["entropy/perceptual"]
    assert second["constraint/weight"] == pytest.approx(max(0, 0.7 + 0.5 * deficit), rel=1e-5)
    result = json.loads((tmp_path / "eval.json").read_text())
    for name in ("entropy/output", "entropy/output_error", "entropy/logdet_clip"):
        assert math.isfinite(result[name]) and math.isfinite(result[f"base/{name}"])
