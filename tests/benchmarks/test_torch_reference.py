"""The torch step of the benchmarks against ours: the same numbers, so that the work is equal."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import setups, torch_functions, torch_models, torch_reference
from pec_jax.config import ConfigError
from pec_jax.config.schema import from_config_dict
from pec_jax.flow import sampler
from pec_jax.profiling import flops
from pec_jax.rl.rollout import rollout
from pec_jax.rl.score import score
from pec_jax.rl.update import update
from pec_jax.weights.lora_files import lora_to_torch
from tests.conftest import small_config_dict


def nchw(a) -> torch.Tensor:
    """[..., h, w, C] -> [..., C, h, w]."""
    return torch.from_numpy(np.moveaxis(np.asarray(a), -1, -3).copy())


@pytest.fixture(scope="module", autouse=True)
def exact_and_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on such small arrays, threads wait for each other
    with jax.default_matmul_precision("highest"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setup():
    """Guidance, two mini-batches in pieces, a constraint: all that an update can have."""
    config = small_config_dict()
    config.sampler.guidance = 3.0
    config.batch.update({"rollout_images": 2, "decode_images": 2, "update_images": 1})
    config.updates.minibatches = 2
    config.objective.grpo.update({"clip_low": 1e-2, "clip_high": 2e-2})
    config.constraints.pec.update({"weight": 0.5, "unit": "reward_std"})
    config.perception.k = 2
    config.optimizer.eps = 1e-3  # 1e-8 would blow the rounding of tiny gradients up to whole steps
    setup = setups.loaded(from_config_dict(config))
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda a: a + 0.05 * rng.normal(size=a.shape), setup.params)
    return dataclasses.replace(setup, params=jax.tree.map(np.float32, noisy))


@pytest.fixture(scope="module")
def ours(setup):
    """(rollout with rewards and surprisals, state after the update, metrics) of our step."""

    program = setup.program

    @jax.jit
    def run(state, inputs, key):
        trajectory = rollout(program.drawing, state.params, inputs, key)
        found, _ = score(program.scorer, inputs, trajectory, program.drawing.group_size)
        return found, *update(program.learner, state, inputs, found, key)

    return run(program.initial_state(setup.params), (setup.frozen, setup.batch), setup.key)


@pytest.fixture
def theirs(setup):
    return torch_reference.TorchStep(setup, torch_models.load(setup, torch.device("cpu")))


def close(found, expected, tolerance, rounding=0.0):
    """Within `tolerance` of the largest number expected, and `rounding`."""
    expected = np.asarray(expected)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(found), expected, rtol=0, atol=tolerance * scale + rounding
    )


def test_the_same_noise_gives_the_same_trajectory_and_scores(setup, ours, theirs):
    rollout = ours[0]
    keys = sampler.image_keys(jax.random.fold_in(setup.key, 1), 8)

    def noise(step, images):
        shape = (len(images), 16, 16, 4)
        return nchw(sampler._step_noise(keys[images.numpy()], jnp.int32(step), shape))

    found = theirs.rollout(nchw(rollout.trajectory.x_t[0]), noise)
    close(found.x_next, nchw(rollout.trajectory.x_next), 1e-4)
    close(found.logp, rollout.trajectory.logp, 1e-5)
    images = theirs.decode(nchw(rollout.trajectory.x_0))
    features = {network: theirs.features(network, images) for network in theirs.models.encoders}
    assert len(features) == 2
    # A pixel that rounds to the neighbouring 8-bit level moves a reward by a few 1e-5.
    close(theirs.rewards(features), rollout.rewards, 2e-4)
    close(theirs.surprisal(features), rollout.surprisal, 2e-4)


def test_the_same_trajectory_gives_the_same_update(setup, ours, theirs):
    rollout, state, metrics = ours
    trajectory = torch_reference.Trajectory(
        nchw(rollout.trajectory.x_t),
        nchw(rollout.trajectory.x_next),
        torch_models.to_tensor(rollout.trajectory.logp),
        nchw(rollout.trajectory.x_0),
    )
    inputs = (torch_models.to_tensor(a) for a in (rollout.rewards, rollout.surprisal))
    found = theirs.update(trajectory, *inputs)
    assert found["logp_drift"] < 1e-4
    np.testing.assert_allclose(np.mean(found["loss"]), metrics["policy/loss"], rtol=1e-3)
    np.testing.assert_allclose(np.mean(found["grad_norm"]), metrics["policy/grad_norm"], rtol=1e-3)
    expected = {
        kind: {
            name.removeprefix("transformer."): array
            for name, array in lora_to_torch(getattr(state, kind)).items()
        }
        for kind in ("params", "ema")
    }
    before = lora_to_torch(setup.params)
    for (name, parameter), ema in zip(theirs.models.lora.items(), theirs.ema):
        first = before[f"transformer.{name}"]
        moved = expected["params"][name] - first
        # Where there is no gradient, what is left of a move is the rounding of the parameter.
        close(parameter.detach().numpy() - first, moved, 5e-3, rounding=2e-7)
        close(ema.numpy() - first, expected["ema"][name] - first, 5e-3, rounding=2e-7)


@pytest.mark.parametrize("estimator", torch_functions.ESTIMATORS)
def test_estimators(estimator):
    from pec_jax.perception.entropy import ESTIMATORS

    features = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    option = {"gaussian": {"bandwidth": 0.3}, "knn": {"k": 2}}[estimator]
    expected = functools.partial(ESTIMATORS[estimator], **option)(features)
    function = getattr(torch_functions, f"{estimator}_surprisal")
    close(function(torch.from_numpy(features), *option.values()), expected, 1e-5)


def test_what_torch_does_not_know_is_said(small_config):
    small_config.constraints.kl_cov.weight = 1.0
    with pytest.raises(ConfigError, match=r"config.constraints=kl_cov; it knows pec"):
        torch_functions.check(from_config_dict(small_config))


def test_a_step_without_perception_computes_no_features(setup):
    with pytest.raises(ConfigError, match=r"constraints\.pec needs"):
        setups.without_perception(setup)
    plain = setups.without_perception(setups.with_constraints(setup, {}))
    scorer = plain.program.scorer
    features = {name: np.zeros((2, 4, 3), np.float32) for name in scorer.spaces}
    assert scorer.surprisal(features).shape == (2, 4)
    assert scorer.spaces["dino"].features(None, np.ones((5, 8, 8, 3))).shape == (5, 3)


def test_an_encoder_that_is_reward_and_perception_counts_once(setup):
    perception = dataclasses.replace(setup.config.perception, encoder="pickscore")
    shared = setups.loaded(dataclasses.replace(setup.config, perception=perception))
    plain = setups.without_perception(setups.with_constraints(setup, {}))
    inputs = setup.frozen, setup.batch
    drawing = setup.program.drawing
    trajectory = jax.eval_shape(
        functools.partial(rollout, drawing), setup.params, inputs, setup.key
    )

    def count(found):
        scorer = setups.as_compiled(found.program).scorer
        return flops.count(lambda *a: score(scorer, *a, drawing.group_size), inputs, trajectory)

    assert count(shared) == count(plain) < count(setup)


def test_other_constraints_are_given_as_fields(setup):
    assert setups.constraint_sections("none") == {}
    text = "pec.weight=1.5,pec.unit=reward_std,kl.weight=0.01"
    sections = setups.constraint_sections(text)
    assert sections == {"pec": {"weight": 1.5, "unit": "reward_std"}, "kl": {"weight": 0.01}}
    assert setups.reading_perception(setups.with_constraints(setup, sections)) == ["pec"]
    with pytest.raises(ConfigError, match="--against is 'kl'; give none, or fields"):
        setups.constraint_sections("kl")
    with pytest.raises(ConfigError, match=r"config.constraints.*'klo'"):
        setups.with_constraints(setup, {"klo": {"weight": 1.0}})


def test_the_same_weights_run_under_other_fields(setup):
    fields = setups.fields_of("batch.update_images=2,model.remat=full")
    assert fields == {"batch.update_images": 2, "model.remat": "full"}
    variant = setups.with_fields(setup, fields)
    assert variant.config.batch.update_images == 2 and variant.config.model.remat == "full"
    for ours, theirs in zip(jax.tree.leaves(setup.params), jax.tree.leaves(variant.params)):
        assert ours is theirs
    with pytest.raises(ConfigError, match="other weights or another batch"):
        setups.with_fields(setup, {"batch.groups": 4})
    with pytest.raises(ConfigError, match="'update_image'"):
        setups.with_fields(setup, {"batch.update_image": 4})
    with pytest.raises(ConfigError, match="give FIELD=VALUE"):
        setups.fields_of("batch.update_images")


def test_a_copy_of_modules_shares_its_numbers(theirs):
    copy = torch_models.shared_copy(theirs.models.transformer)
    assert copy.transformer_blocks[0] is not theirs.models.transformer.transformer_blocks[0]
    pairs = zip(copy.parameters(), theirs.models.transformer.parameters(), strict=True)
    assert all(a is b for a, b in pairs)


def test_networks_with_numbers_of_their_own(setup):
    models = torch_models.load(setup, torch.device("cpu"), drawn=True)
    split = torch_reference.TorchStep(setup, models).iteration()
    assert set(split) == {"rollout", "decode", "score", "entropy", "update"}
