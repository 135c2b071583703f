"""Every constraint and objective inside the update; per-step surprisals; the dual variable."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.config import ConfigError, from_config_dict
from pec_jax.config.registry import CONSTRAINTS
from pec_jax.perception import spaces
from pec_jax.rl import score as scores
from pec_jax.rl.train_step import experienced, train_step
from pec_jax.training import build, trainer
from tests.conftest import small_config_dict
from tests.rl.test_train_step import (
    assert_equal,
    changed,
    inputs_of,
    make_state,
    run_update,
)

# What turns each one on; a share of .8, for the batch has but 16 samples to draw from.
ON = {
    "clip_cov": {"share": 0.8},
    "clip_higher": {"ratio": 1.4},
    "kl_cov": {"weight": 0.5, "share": 0.8},
    "pec_target": {"target": 0.9, "weight": 0.5},
}


@pytest.fixture(scope="module")
def drawn(experiment):
    """(state, inputs, rollout with per-step surprisals, metrics), not of the base model."""
    program = changed(experiment, perception__at="steps")
    state, inputs = make_state(experiment, noise=0.05), inputs_of(experiment)
    run = jax.jit(functools.partial(experienced, program))
    return state, inputs, *run(state.params, inputs, jax.random.key(1))


@pytest.fixture(scope="module")
def updated(experiment, drawn):
    """(per step, dotted fields) -> (state, metrics) after one rollout's two updates; cached."""

    @functools.cache
    def run(per_step=False, **fields):
        program = changed(experiment, updates__minibatches=2, **fields)
        surprisal = drawn[2].surprisal if per_step else drawn[2].surprisal[-1]
        return run_update(program, drawn, surprisal=surprisal)

    return run


def on(name):
    """The fields that turn a constraint on."""
    return {f"constraints__{name}__{k}": v for k, v in ON.get(name, {"weight": 0.5}).items()}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_every_constraint_trains(name, updated, drawn):
    after, metrics = updated(**on(name))
    values = {key: float(value) for key, value in metrics.items()}
    assert all(map(math.isfinite, values.values())), values
    assert not same(after.params, drawn[0].params)
    assert values["policy/ratio_max_deviation"] == 0.0
    if CONSTRAINTS[name].select is not None:
        assert 0 < values[f"constraint/{name}/selected"] < 1
    if name != "clip_higher":
        assert not same(after.params, updated()[0].params)


def test_the_exact_entropy_bonus_changes_nothing_bit_for_bit(updated):
    exact = {"constraints__entropy_reg__space": "latent"}
    exact["constraints__entropy_reg__gradient"] = "exact"
    after, metrics = updated(**on("entropy_reg"), **exact)
    assert same(after.params, updated()[0].params)
    assert float(metrics["constraint/entropy_reg/loss"]) != 0.0  # there, without a gradient


def test_pec_kl_and_clip_higher_in_one_run(updated):
    """The first combination anybody asks for; and each of them off is the run without it."""
    every = {**on("pec"), **on("kl"), **on("clip_higher")}
    after, metrics = updated(**every)
    assert {"constraint/pec/share", "constraint/kl/loss"} <= metrics.keys()
    for name, off in (("pec", 0.0), ("kl", 0.0), ("clip_higher", 1.0)):
        field = CONSTRAINTS[name].parameter
        without = {k: v for k, v in every.items() if f"__{name}__" not in k}
        assert_equal(
            updated(**without, **{f"constraints__{name}__{field}": off})[0].params,
            updated(**without)[0].params,
        )
        assert name == "clip_higher" or not same(after.params, updated(**without)[0].params)


def test_a_surprisal_for_each_step_enters_that_steps_reward(updated, drawn):
    per_step, metrics = updated(per_step=True, **on("pec"))
    assert not same(per_step.params, updated(**on("pec"))[0].params)
    expected = 0.5 * float(jnp.mean(drawn[2].surprisal))
    np.testing.assert_allclose(metrics["constraint/pec/bonus_mean"], expected, rtol=1e-5)


def test_surprisals_of_steps_are_those_of_the_decoded_predictions(experiment, drawn):
    _, (frozen, batch), found, metrics = drawn
    scorer, trained = (
        experiment.program.scorer,
        experiment.program.learner.policy.sampler.trained_steps,
    )
    assert found.surprisal.shape == (len(trained), *found.rewards.shape)
    space = scorer.spaces["dino"]
    for x_0_hat, surprisal in zip(found.trajectory.x_0_hat[trained], found.surprisal):
        images = scorer.decode(frozen.vae, x_0_hat)
        levels = jnp.round(images * 255) / 255
        features = space.features(frozen.networks[space.network], levels)
        by_hand = scorer.surprisal({"dino": features.reshape(*found.rewards.shape, -1)})
        # A pixel on the edge of two 8-bit levels may fall to either side in another graph.
        np.testing.assert_allclose(surprisal, by_hand, atol=5e-3)
    score = functools.partial(scores.score, scorer, group_size=4)
    _, plain = jax.jit(score)((frozen, batch), found.trajectory)
    name = "entropy/perceptual"
    np.testing.assert_allclose(metrics[name], plain[name], atol=1e-4)
    assert "entropy/perceptual_steps" in metrics


def perception(encoder):
    config = small_config_dict()
    config.perception.encoder = encoder
    return from_config_dict(config).perception


def test_a_sum_of_encoders_is_the_weighted_mean_of_their_surprisals():
    rng = np.random.default_rng(0)
    features = {
        name: jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32) for name in ("dino", "clip")
    }

    def surprisal(encoder):
        return spaces.surprisal_function(perception(encoder), jnp.ones(1))(features)

    expected = (2 * surprisal("dino") + surprisal("clip")) / 3
    np.testing.assert_allclose(surprisal("dino + 0.5 * clip"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "text, words",
    [
        *(
            (t, "a sum of")
            for t in ("dino + dino", "-1 * dino", "", "x * dino", "dino +", "0*dino")
        ),
        ("dino + nothing", "nothing"),
        ("dinno", "Did you mean 'dino'"),
    ],
)
def test_what_is_no_sum_of_encoders_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        spaces.shares(perception(text))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"constraints.pec.weight": 1.0, "constraints.pec_target.target": 0.9}, "exclude"),
        ({"objective.name": "nft", "constraints.clip_higher.ratio": 1.4}, "needs ratio"),
        ({"objective.name": "nft", "perception.at": "steps"}, "keeps no steps"),
        ({"batch.group_size": 2, "constraints.pec.weight": 1.0, "perception.k": 1}, "at least 3"),
        ({"perception.encoder": "dino + nothing"}, "nothing"),
    ],
)
def test_combinations_without_meaning_are_refused_before_anything_is_loaded(fields, words):
    config = small_config_dict()
    config.model.path = "/there/is/no/such/model"
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=words):
        build.build(from_config_dict(config))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"sampler__kernel": "ode"}, "learns from noise"),
        ({"sampler__noise_level": 0.0}, "learns from noise"),
        ({"sampler__kernel": "cps", "sampler__window": (0, 3)}, "leaves out the last step"),
        ({"objective__name": "nft", "objective__nft__levels": 7}, "more than the 3"),
        (
            {
                "objective__name": "nft",
                "sampler__kernel": "ode",
                "perception__estimator": "gaussian",
            },
            "give a bandwidth",
        ),
    ],
)
def test_samplers_that_cannot_be_learned_from_are_refused(experiment, fields, words):
    with pytest.raises(ConfigError, match=words):
        changed(experiment, **fields)


@pytest.mark.parametrize("kernel", ["ode", "flow_sde"])
def test_nft_trains_on_any_sampler_and_its_old_policy_follows(experiment, kernel):
    program = changed(
        experiment,
        objective__name="nft",
        sampler__kernel=kernel,
        constraints__pec__weight=0.5,
        constraints__kl__weight=0.1,
        updates__minibatches=2,
    )
    state = make_state(experiment, program, noise=0.05)
    step = jax.jit(functools.partial(train_step, program))
    after, metrics = step(state, *inputs_of(experiment), jax.random.key(0))
    values = {key: float(value) for key, value in metrics.items()}
    assert all(map(math.isfinite, values.values())), values
    assert values["policy/grad_norm"] > 0 and values["constraint/pec/share"] > 0
    assert "entropy/policy" not in values
    # `ramp`: after 2 updates, .002 of the old policy stays.
    expected = jax.tree.map(lambda o, p: 0.002 * o + 0.998 * p, state.params, after.params)
    for a, b in zip(jax.tree.leaves(after.objective["old"]), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_dual_variable_of_a_run(tmp_path):
    config = small_config_dict()
    config.num_iterations = 2
    config.perception.k = 1
    config.eval.entropy_probes = 1
    config.constraints.pec_target.update(
        {"weight": 0.7, "rate": 0.5, "target": 0.8, "base_batches": 1}
    )
    trainer.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if "reward/mean" in line)
    prefix = "constraint/pec_target/"
    assert first[prefix + "target"] == second[prefix + "target"] != 0
    assert first[prefix + "weight"] == pytest.approx(0.7)
    deficit = first[prefix + "target"] - first["entropy/perceptual"]
    assert second[prefix + "weight"] == pytest.approx(max(0, 0.7 + 0.5 * deficit), rel=1e-5)
    result = json.loads((tmp_path / "eval.json").read_text())
    for name in ("entropy/output", "entropy/output_error", "entropy/logdet_clip"):
        assert math.isfinite(result[name]) and math.isfinite(result[f"base/{name}"])
