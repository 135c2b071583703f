"""The train step as a whole, on the embedded model: ratios, gradients, micro-batches, NaNs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pec_jax.rl.program import bind, initial_state

from pec_jax.config.schema import from_config_dict
from pec_jax.flow.sampler import step_log_prob
from pec_jax.flow.transition import policy_entropy, schedule_stds
from pec_jax.rewards.base import Reward
from pec_jax.rl import train_step as steps
from pec_jax.rl import update as updates
from pec_jax.rl.advantages import group_advantages
from pec_jax.rl.constraints import get_constraint
from pec_jax.training.build import make_world
from tests.conftest import small_config_dict


def make_state(world, noise: float = 0.0):
    """A first state; `noise` moves the LoRA away from doing nothing."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(a + noise * rng.normal(size=a.shape), jnp.float32), world.params
    )
    return initial_state(params, world.program.optimizer, world.config.constraint.weight)


def changed(world, **sections):
    """The world's program under a config with some fields changed."""
    config = world.config
    for section, fields in sections.items():
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **fields)}
        )
    constraint = get_constraint(config.constraint.name)
    return dataclasses.replace(world.program, config=config, constraint=constraint)


@pytest.fixture(scope="module")
def experience(world):
    """One rollout, scored: (state, batch, rollout)."""
    state, batch = make_state(world, noise=0.05), world.train.gather([0, 1])

    @jax.jit
    def run(state, frozen, batch, key):
        trajectory = steps.rollout(world.program, state.params, frozen, batch, key)
        return steps.score(world.program, frozen, batch, trajectory)

    return state, batch, run(state, world.frozen, batch, jax.random.key(1))


def run_update(program, world, state, batch, rollout):
    return jax.jit(functools.partial(updates.update, program))(
        state, world.frozen, batch, rollout, jax.random.key(7)
    )


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(float(np.abs(np.asarray(y)).max()), 1e-12)
        np.testing.assert_allclose(x, y, atol=rtol * scale, rtol=0)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_exactly_one(dtype, minibatches):
    config = small_config_dict()
    config.model.dtype = config.sampler.storage_dtype = dtype
    config.grpo.minibatches = minibatches
    config.num_iterations = 1
    world = make_world(from_config_dict(config))
    state = make_state(world, noise=0.05)
    step = jax.jit(functools.partial(steps.train_step, world.program))
    state, metrics = step(state, world.frozen, world.train.gather([0, 1]), jax.random.key(0))
    assert float(metrics["policy/ratio_max_deviation"]) == 0.0
    assert float(metrics["policy/grad_norm"]) > 0
    # The rollout's own log-probs differ from the update's by no more than rounding.
    assert float(metrics["policy/logp_drift"]) < (1e-5 if dtype == "float32" else 2e-2)
    assert int(state.step) == 1


def reinforce_gradient(world, state, batch, rollout):
    """-mean(A grad log p) over all images and trained steps, written out plainly."""
    program, trajectory = world.program, rollout.trajectory
    advantages = group_advantages(rollout.rewards).reshape(-1)
    repeated = jax.tree.map(
        lambda a: jnp.repeat(a, rollout.rewards.shape[1], axis=0), batch.conditioning
    )

    def loss(params):
        variables = bind(program.config.trainable, params, world.frozen.transformer)
        total = 0.0
        for t in program.trained_steps:
            logp, _, _ = step_log_prob(
                program.guide(program.config.sampler.guidance, world.frozen.negative),
                variables,
                trajectory.x_t[t],
                trajectory.x_next[t],
                program.sigmas[t],
                program.sigmas[t + 1],
                repeated,
                kernel=program.config.sampler.kernel,
                noise_level=program.config.sampler.noise_level,
                sigma_max=program.sigmas[1],
            )
            total -= jnp.mean(advantages * logp)
        return total / len(program.trained_steps)

    return jax.jit(jax.grad(loss))(state.params)


def test_the_gradient_is_that_of_reinforce(world, experience):
    state, batch, rollout = experience
    expected = reinforce_gradient(world, state, batch, rollout)
    # An optimizer that only remembers shows the gradient itself.
    program = changed(world, grpo={"clip_low": 1e-9, "clip_high": 1e-9})
    program = dataclasses.replace(program, optimizer=optax.trace(decay=0.0))
    state = initial_state(state.params, program.optimizer, 0.0)
    after, _ = run_update(program, world, state, batch, rollout)
    # Sums over 8 images of 256 latents in another order: a few units of fp32's 6e-8, amplified.
    assert_close(after.opt_state.trace, expected, rtol=1e-4)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)) > 1e-5


@pytest.mark.parametrize("minibatches", [1, 2])
def test_micro_batches_do_not_change_the_update(world, experience, minibatches):
    state, batch, rollout = experience
    whole = changed(world, grpo={"minibatches": minibatches})
    pieces = changed(world, grpo={"minibatches": minibatches}, batch={"update_images": 1})
    a, metrics_a = run_update(whole, world, state, batch, rollout)
    b, metrics_b = run_update(pieces, world, state, batch, rollout)
    np.testing.assert_allclose(
        metrics_a["policy/grad_norm"], metrics_b["policy/grad_norm"], rtol=1e-5
    )
    # Adam divides by the gradient's size, so that it enlarges rounding where a gradient is tiny:
    # compare the first moments, which are linear in the gradient.
    assert_close(moments(a), moments(b), rtol=1e-4)


def moments(state):
    return [
        s.mu
        for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
        if hasattr(s, "mu")
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_in_pieces_draws_the_same_images(world, experience, dtype):
    state, batch, _ = experience
    drawn = [
        jax.jit(functools.partial(steps.rollout, program))(
            state.params, world.frozen, batch, jax.random.key(1)
        )
        for program in (
            changed(world, batch={"rollout_images": images}, sampler={"storage_dtype": dtype})
            for images in (0, 2)
        )
    ]
    for whole, pieces in zip(*map(jax.tree.leaves, drawn), strict=True):
        assert whole.shape == pieces.shape and whole.dtype == pieces.dtype
        # Sums in another order; in bfloat16 one of them may round to the neighbour.
        tolerance = 2e-5 if dtype == "float32" else 0.1
        np.testing.assert_allclose(
            whole.astype(np.float32), pieces.astype(np.float32), atol=tolerance
        )


def test_decoding_in_pieces_does_not_change_the_scores(world, experience):
    _, batch, rollout = experience
    program = changed(world, batch={"decode_images": 1})
    pieces = jax.jit(functools.partial(steps.score, program))(
        world.frozen, batch, rollout.trajectory
    )
    np.testing.assert_allclose(pieces.rewards, rollout.rewards, atol=2e-5)
    np.testing.assert_allclose(pieces.surprisal, rollout.surprisal, atol=1e-4)
    name = "diversity/variance_pixel"
    np.testing.assert_allclose(pieces.metrics[name], rollout.metrics[name], rtol=1e-4)


def test_the_pixel_variance_is_that_of_the_images_as_saved():
    levels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 4, 3), np.uint8)
    expected = (levels.reshape(2, 5, -1) / 255.0).var(axis=1).sum(axis=-1).mean()
    np.testing.assert_allclose(steps._pixel_variance(jnp.asarray(levels)), expected, rtol=1e-5)


def test_the_groups_of_a_rollout_belong_to_their_prompts(world, experience):
    """With no noise in the sampler, equal starts and equal prompts give equal images."""
    state, _, _ = experience
    batch = world.train.gather([3, 3])
    program = changed(world, sampler={"noise_level": 0.0})
    program = dataclasses.replace(
        program,
        guide=lambda *_: lambda _, x, sigma, c: x * 0 + c.pooled.mean(-1)[:, None, None, None],
    )
    trajectory = steps.rollout(program, state.params, world.frozen, batch, jax.random.key(2))
    moved = np.asarray(trajectory.x_0 - trajectory.x_t[0])
    assert np.ptp(moved, axis=0).max() < 1e-5
    two = steps.rollout(
        program, state.params, world.frozen, world.train.gather([3, 4]), jax.random.key(2)
    )
    moved = np.asarray(two.x_0 - two.x_t[0])
    size = world.config.batch.group_size
    assert np.ptp(moved[:size], axis=0).max() < 1e-5
    assert np.abs(moved[:size] - moved[size:]).min() > 1e-6


def test_pec_with_weight_zero_is_none_bit_for_bit(world, experience):
    state, batch, rollout = experience
    none, _ = run_update(changed(world, constraint={"name": "none"}), world, state, batch, rollout)
    pec, _ = run_update(changed(world, constraint={"name": "pec"}), world, state, batch, rollout)
    for a, b in zip(jax.tree.leaves(none), jax.tree.leaves(pec), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pec_with_a_weight_changes_the_update(world, experience):
    state, batch, rollout = experience
    state = state.replace(constraint_weight=jnp.float32(0.5))
    program = changed(world, constraint={"name": "pec"})
    after, metrics = run_update(program, world, state, batch, rollout)
    expected = 0.5 * float(jnp.mean(rollout.surprisal))
    np.testing.assert_allclose(metrics["constraint/bonus_mean"], expected, rtol=1e-5)
    none, _ = run_update(changed(world, constraint={"name": "none"}), world, state, batch, rollout)
    assert not np.array_equal(jax.tree.leaves(after.params)[0], jax.tree.leaves(none.params)[0])


def test_kl_is_zero_at_the_base_model_and_pulls_back_towards_it(world, experience):
    state, batch, rollout = experience
    program = changed(world, constraint={"name": "kl"})
    still = rollout.replace(rewards=jnp.zeros_like(rollout.rewards))  # no advantage: KL alone

    base = make_state(world).replace(constraint_weight=jnp.float32(1.0))
    _, metrics = run_update(program, world, base, batch, still)
    assert float(metrics["policy/kl"]) == 0.0
    assert float(metrics["policy/grad_norm"]) == 0.0

    moved = state.replace(constraint_weight=jnp.float32(1.0))
    after, before_metrics = run_update(program, world, moved, batch, still)
    assert float(before_metrics["policy/kl"]) > 1e-6
    assert float(before_metrics["policy/grad_norm"]) > 1e-6
    _, after_metrics = run_update(program, world, after, batch, still)
    assert float(after_metrics["policy/kl"]) < float(before_metrics["policy/kl"])


def test_the_policy_entropy_does_not_depend_on_what_is_learned(world, experience):
    _, _, rollout = experience
    sampler = world.config.sampler
    stds = schedule_stds(world.program.sigmas, sampler.kernel, sampler.noise_level)
    expected = float(jnp.mean(policy_entropy(stds[world.program.trained_steps])))
    assert float(rollout.metrics["entropy/policy"]) == pytest.approx(expected, abs=1e-6)
    assert float(rollout.metrics["entropy/policy_mc"]) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_changes_nothing_and_is_counted(world, experience, poison):
    state, batch, rollout = experience
    bad = rollout.replace(rewards=rollout.rewards.at[0, 1].set(poison))
    after, metrics = run_update(world.program, world, state, batch, bad)
    assert float(metrics["policy/skipped"]) == 1.0
    assert int(after.skipped) == 1
    for name in ("params", "ema", "opt_state"):
        before, now = getattr(state, name), getattr(after, name)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True):
            np.testing.assert_array_equal(a, b)
    good, metrics = run_update(world.program, world, after, batch, rollout)
    assert float(metrics["policy/skipped"]) == 0.0 and int(good.skipped) == 0


def test_a_reward_of_ones_own_runs_inside_the_step(world):
    """What rewards/base.py promises: one function, one name."""
    from pec_jax.rewards import base

    def score(params, images, inputs):
        return jnp.mean(images[..., 0] - images[..., 2], axis=(-2, -1))

    reward = base.CombinedReward(
        {"warmth": Reward("warmth", lambda prompts: {}, score)}, {"warmth": 1.0}
    )
    program = dataclasses.replace(world.program, reward=reward, reward_encoder={"warmth": ""})
    frozen = world.frozen.replace(rewards={**world.frozen.rewards, "warmth": {}})
    batch = world.train.gather([0, 1])
    batch = batch.replace(reward_inputs={**batch.reward_inputs, "warmth": {}})
    _, metrics = jax.jit(functools.partial(steps.train_step, program))(
        make_state(world), frozen, batch, jax.random.key(0)
    )
    assert -1.0 < float(metrics["reward/warmth"]) < 1.0


def test_full_fine_tuning_learns_every_weight():
    config = small_config_dict()
    config.trainable.mode = "full"
    world = make_world(from_config_dict(config))
    state = make_state(world)
    step = jax.jit(functools.partial(steps.train_step, world.program))
    after, metrics = step(state, world.frozen, world.train.gather([0, 1]), jax.random.key(0))
    assert float(metrics["policy/ratio_max_deviation"]) == 0.0
    same = jax.tree.map(np.array_equal, state.params, after.params)
    still = [jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(same) if v]
    # The last block gives no text tokens out, so that nothing asks for their queries.
    assert still == ["['transformer_blocks.3:4']['attn']['add_q_proj']['bias']"]
