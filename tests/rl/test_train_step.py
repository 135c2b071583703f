"""The train step as a whole, on the embedded model: ratios, gradients, micro-batches, NaNs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pec_jax.config import from_config_dict
from pec_jax.flow.sampler import FlowSampler
from pec_jax.flow.transition import policy_entropy
from pec_jax.rewards import Reward
from pec_jax.rewards.combined import CombinedReward
from pec_jax.rl import score as scores
from pec_jax.rl.advantages import group_advantages
from pec_jax.rl.rollout import rollout
from pec_jax.rl.train_step import WINDOW, experienced, initial_state, train_step
from pec_jax.rl.update import update
from pec_jax.training import build
from pec_jax.types import Transition
from tests.conftest import small_config_dict


def changed(experiment, **overrides):
    """The experiment's program under a config with some dotted fields changed (`__` for a dot)."""
    config = small_config_dict()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    judges = build.Judges(experiment.rewards, experiment.spaces)
    return build.make_program(from_config_dict(config), experiment.pipeline, judges)


def make_state(experiment, program=None, noise: float = 0.0):
    """A first state; `noise` moves the LoRA away from doing nothing."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(a + noise * rng.normal(size=a.shape), jnp.float32), experiment.params
    )
    return (program or experiment.program).initial_state(params)


def inputs_of(experiment, ids=(0, 1)):
    """What does not learn, and the prompts."""
    return experiment.frozen, experiment.tables["train"].gather(np.asarray(ids))


@pytest.fixture(scope="module")
def drawn(experiment):
    """One rollout, scored: (state, inputs, rollout, metrics)."""
    state, inputs = make_state(experiment, noise=0.05), inputs_of(experiment)
    run = jax.jit(functools.partial(experienced, experiment.program))
    return state, inputs, *run(state.params, inputs, jax.random.key(1))


def run_update(program, drawn, state=None, **changes):
    """One update of a program on the rollout; the state is made anew for what is on."""
    before, inputs, found, _ = drawn
    state = state or program.initial_state(before.params)
    step = jax.jit(functools.partial(update, program.learner))
    return step(state, inputs, found.replace(**changes), jax.random.key(7))


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(float(np.abs(np.asarray(y)).max()), 1e-12)
        np.testing.assert_allclose(x, y, atol=rtol * scale, rtol=0)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("objective", ["grpo", "grpo_guard"])
@pytest.mark.parametrize("dtype, minibatches", [("float32", 2), ("bfloat16", 1)])
def test_the_first_ratio_is_exactly_one(dtype, minibatches, objective):
    config = small_config_dict()
    config.model.dtype = config.sampler.storage_dtype = dtype
    config.updates.minibatches = minibatches
    config.objective.name = objective
    made = build.build(from_config_dict(config))
    state = make_state(made, noise=0.05)
    step = jax.jit(functools.partial(train_step, made.program))
    state, metrics = step(state, *inputs_of(made), jax.random.key(0))
    assert float(metrics["policy/ratio_max_deviation"]) == 0.0
    assert float(metrics["policy/grad_norm"]) > 0
    # The rollout's own log-probs differ from the update's by no more than rounding.
    assert float(metrics["policy/logp_drift"]) < (1e-5 if dtype == "float32" else 2e-2)
    assert int(state.step) == 1


@pytest.mark.parametrize("moves", ["forward", "at_random"])
def test_a_step_with_a_moving_window_is_the_step_with_the_window_there(experiment, moves):
    """Also at the first update of the next place, and its entropy is that of the place."""
    fields = {"sampler__num_steps": 5, "updates__minibatches": 2, "perception__bandwidth": 0.3}
    program = changed(experiment, sampler__window=(0, 1), sampler__window_moves=moves, **fields)
    inputs, key = inputs_of(experiment), jax.random.key(0)
    step, places = jax.jit(functools.partial(train_step, program)), []
    for iteration in range(4):
        state = make_state(experiment, program, noise=0.05)
        state = dataclasses.replace(state, step=jnp.int32(iteration))
        window = program.at(state.step, jax.random.fold_in(key, WINDOW)).learner.policy.sampler
        places.append(start := int(window.trained_steps[0]))
        there = changed(experiment, sampler__window=(start, start + 1), **fields)
        after, metrics = step(state, *inputs, key)
        expected, expected_metrics = jax.jit(functools.partial(train_step, there))(
            state, *inputs, key
        )
        assert float(metrics["policy/ratio_max_deviation"]) == 0.0
        assert set(metrics) == set(expected_metrics)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected_metrics[name], rtol=2e-3, atol=1e-6)
        # Adam's first step is a sign where a gradient is far above eps: only rounding is left.
        assert_close(after.ema, expected.ema, rtol=1e-4)
    assert places == [0, 1, 2, 3] if moves == "forward" else set(places) <= {0, 1, 2, 3}


def reinforce_gradient(experiment, drawn, worth=None):
    """-mean(A grad log p) over all images and trained steps, written out plainly."""
    (state, (frozen, batch), found, _), policy = drawn, experiment.program.learner.policy
    worth = group_advantages(found.rewards).reshape(-1) if worth is None else worth
    size, path, sampler = found.rewards.shape[1], found.trajectory, policy.sampler
    actor = policy.before(
        frozen, jax.tree.map(lambda a: jnp.repeat(a, size, axis=0), batch.conditioning)
    )

    def loss(params):
        total = 0.0
        for t in sampler.trained_steps:
            taken = Transition(path.x_t[t], path.x_next[t], *sampler.sigmas[t : t + 2])
            total -= jnp.mean(worth * actor.log_prob(params, taken).logp)
        return total / len(sampler.trained_steps)

    return jax.jit(jax.grad(loss))(state.params)


def test_the_gradient_is_that_of_reinforce(experiment, drawn):
    expected = reinforce_gradient(experiment, drawn)
    # An optimizer that only remembers shows the gradient itself.
    program = changed(experiment, objective__grpo__clip_low=1e-9, objective__grpo__clip_high=1e-9)
    after, _ = run_update(with_optimizer(program, optax.trace(decay=0.0)), drawn)
    # Sums over 8 images of 256 latents in another order: a few units of fp32's 6e-8, amplified.
    assert_close(after.opt_state.trace, expected, rtol=1e-4)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)) > 1e-5


def with_optimizer(program, optimizer):
    """The program with another optimizer."""
    learner = dataclasses.replace(program.learner, optimizer=optimizer)
    return dataclasses.replace(program, learner=learner)


@pytest.mark.parametrize("objective", ["grpo", "grpo_guard", "nft"])
def test_micro_batches_do_not_change_the_update(experiment, drawn, objective):
    fields = {"updates__minibatches": 2, "objective__name": objective}
    a, metrics_a = run_update(changed(experiment, **fields), drawn)
    pieces = changed(experiment, batch__update_images=1, **fields)
    b, metrics_b = run_update(pieces, drawn)
    np.testing.assert_allclose(
        metrics_a["policy/grad_norm"], metrics_b["policy/grad_norm"], rtol=1e-4
    )
    # Adam divides by the gradient's size, so that it enlarges rounding where a gradient is tiny:
    # compare the first moments, which are linear in the gradient. Sums in another order differed
    # by 1.02e-4 once.
    assert_close(moments(a), moments(b), rtol=3e-4)


def moments(state):
    return [
        s.mu
        for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
        if hasattr(s, "mu")
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_in_pieces_draws_the_same_images(experiment, drawn, dtype):
    state, inputs, *_ = drawn
    both = [
        jax.jit(functools.partial(rollout, program.drawing))(
            state.params, inputs, jax.random.key(1)
        )
        for program in (
            changed(experiment, batch__rollout_images=images, sampler__storage_dtype=dtype)
            for images in (0, 2)
        )
    ]
    for whole, pieces in zip(*map(jax.tree.leaves, both), strict=True):
        assert whole.shape == pieces.shape and whole.dtype == pieces.dtype
        # Sums in another order; in bfloat16 one of them may round to the neighbour.
        tolerance = 2e-5 if dtype == "float32" else 0.1
        np.testing.assert_allclose(
            whole.astype(np.float32), pieces.astype(np.float32), atol=tolerance
        )


def test_decoding_in_pieces_does_not_change_the_scores(experiment, drawn):
    _, inputs, found, metrics = drawn
    program = changed(experiment, batch__decode_images=1)
    score = functools.partial(scores.score, program.scorer, group_size=4)
    pieces, piece_metrics = jax.jit(score)(inputs, found.trajectory)
    np.testing.assert_allclose(pieces.rewards, found.rewards, atol=2e-5)
    np.testing.assert_allclose(pieces.surprisal, found.surprisal, atol=1e-4)
    name = "diversity/variance_pixel"
    np.testing.assert_allclose(piece_metrics[name], metrics[name], rtol=1e-4)


def test_the_pixel_variance_is_that_of_the_images_as_saved():
    levels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 4, 3), np.uint8)
    expected = (levels.reshape(2, 5, -1) / 255.0).var(axis=1).sum(axis=-1).mean()
    np.testing.assert_allclose(scores._pixel_variance(jnp.asarray(levels)), expected, rtol=1e-5)


def test_the_groups_of_a_rollout_belong_to_their_prompts(experiment, drawn):
    """With no noise in the sampler, equal starts and equal prompts give equal images."""
    drawing = experiment.program.drawing
    policy = dataclasses.replace(
        drawing.policy,
        guide=lambda *_: lambda _, x, sigma, c: x * 0 + c.pooled.mean(-1)[:, None, None, None],
        sampler=FlowSampler(drawing.policy.sampler.sigmas),
    )
    drawing = dataclasses.replace(drawing, policy=policy)

    def moved(ids):
        path = rollout(drawing, drawn[0].params, inputs_of(experiment, ids), jax.random.key(2))
        return np.asarray(path.x_0 - path.x_t[0])

    assert np.ptp(moved([3, 3]), axis=0).max() < 1e-5
    two, size = moved([3, 4]), drawing.group_size
    assert np.ptp(two[:size], axis=0).max() < 1e-5
    assert np.abs(two[:size] - two[size:]).min() > 1e-6


def test_kl_is_zero_at_the_base_model_and_pulls_back_towards_it(experiment, drawn):
    program = changed(experiment, constraints__kl__weight=1.0)
    still = {"rewards": jnp.zeros_like(drawn[2].rewards)}  # no advantage: KL alone
    _, metrics = run_update(program, drawn, make_state(experiment, program), **still)
    assert float(metrics["policy/kl"]) == 0.0
    assert float(metrics["policy/grad_norm"]) == 0.0

    after, before_metrics = run_update(program, drawn, **still)
    assert float(before_metrics["policy/kl"]) > 1e-6
    assert float(before_metrics["policy/grad_norm"]) > 1e-6
    _, after_metrics = run_update(program, drawn, after, **still)
    assert float(after_metrics["policy/kl"]) < float(before_metrics["policy/kl"])


def test_the_policy_entropy_does_not_depend_on_what_is_learned(experiment, drawn):
    sampler, metrics = experiment.program.learner.policy.sampler, drawn[3]
    expected = float(jnp.mean(policy_entropy(sampler.step_std())))
    assert float(metrics["entropy/policy"]) == pytest.approx(expected, abs=1e-6)
    assert float(metrics["entropy/policy_mc"]) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_image_without_a_reward_is_left_out(experiment, drawn, poison):
    """The gradient is REINFORCE's with advantage 0 for it, the others' as if it were not there."""
    state, found = drawn[0], drawn[2]
    rewards = found.rewards.at[0, 1].set(poison)
    _, metrics = run_update(experiment.program, drawn, state, rewards=rewards)
    assert float(metrics["policy/skipped"]) == 0.0
    worth = np.zeros(rewards.shape, np.float32)
    worth[0, np.arange(rewards.shape[1]) != 1] = group_advantages(np.delete(rewards[:1], 1, 1))[0]
    worth[1:] = group_advantages(rewards[1:])
    expected = reinforce_gradient(experiment, drawn, worth.reshape(-1))
    norm = float(optax.global_norm(expected))
    assert float(metrics["policy/grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_latents_that_are_not_finite_change_nothing_but_their_own_image(experiment, drawn):
    state, found = drawn[0], drawn[2]
    path = found.trajectory
    broken = {name: getattr(path, name).at[:, 1].set(jnp.nan) for name in ("x_t", "x_next", "logp")}
    broken = path.replace(**broken)
    rewards = found.rewards.at[0, 1].set(jnp.nan)
    one, metrics = run_update(experiment.program, drawn, state, rewards=rewards, trajectory=broken)
    other, _ = run_update(experiment.program, drawn, state, rewards=rewards)
    assert float(metrics["policy/skipped"]) == 0.0
    assert_close(one.params, other.params)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(experiment, drawn):
    state = drawn[0]
    bad = state.replace(params=jax.tree.map(lambda a: a.at[0].set(jnp.nan), state.params))
    after, metrics = run_update(experiment.program, drawn, bad)
    assert float(metrics["policy/skipped"]) == 1.0
    assert int(after.skipped) == 1
    for name in ("params", "ema", "opt_state"):
        assert_equal(getattr(bad, name), getattr(after, name))
    good, metrics = run_update(experiment.program, drawn, after.replace(params=state.params))
    assert float(metrics["policy/skipped"]) == 0.0 and int(good.skipped) == 0


def test_a_reward_of_ones_own_runs_inside_the_step(experiment):
    """What rewards/base.py promises: one function, one name."""

    def score(variables, images, inputs):
        return jnp.mean(images[..., 0] - images[..., 2], axis=(-2, -1))

    reward = CombinedReward({"warmth": Reward("warmth", score)}, {"warmth": 1.0})
    scorer = dataclasses.replace(experiment.program.scorer, reward=reward)
    program = dataclasses.replace(experiment.program, scorer=scorer)
    frozen, batch = inputs_of(experiment)
    batch = batch.replace(reward_inputs={**batch.reward_inputs, "warmth": {}})
    _, metrics = jax.jit(functools.partial(train_step, program))(
        make_state(experiment), frozen, batch, jax.random.key(0)
    )
    assert -1.0 < float(metrics["reward/warmth"]) < 1.0


def test_full_fine_tuning_learns_every_weight():
    config = small_config_dict()
    config.trainable.mode = "full"
    made = build.build(from_config_dict(config))
    state = make_state(made)
    step = jax.jit(functools.partial(train_step, made.program))
    after, metrics = step(state, *inputs_of(made), jax.random.key(0))
    assert float(metrics["policy/ratio_max_deviation"]) == 0.0
    same = jax.tree.map(np.array_equal, state.params, after.params)
    still = [jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(same) if v]
    # The last block gives no text tokens out, so that nothing asks for their queries.
    assert still == ["['transformer_blocks.4:5']['attn']['add_q_proj']['bias']"]


def test_the_first_state_is_a_copy(experiment):
    learner = experiment.program.learner
    state = initial_state(
        experiment.params, learner.optimizer, learner.objective, learner.constraints
    )
    assert_equal(state.params, experiment.params)
    assert all(a is not b for a, b in zip(*map(jax.tree.leaves, (state.params, state.ema))))
