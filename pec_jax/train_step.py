"""THE train step: rollout -> decode -> reward -> surprisal -> advantage -> update.

`train_step(program, state, frozen, batch, key) -> (state, metrics)` is compiled once. It is
composed of `rollout`, `score` and `update`, which are public, pure and tested by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pec_jax.data.pipeline import repeat_groups
from pec_jax.flow.sampler import sample
from pec_jax.flow.transition import policy_entropy
from pec_jax.perception.entropy import perceptual_variance, scale_features
from pec_jax.program import Frozen, Program, bind
from pec_jax.rewards.base import as_8bit
from pec_jax.types import Array, Batch, PyTree, Rollout, TrainState, Trajectory
from pec_jax.update import update


def train_step(
    program: Program, state: TrainState, frozen: Frozen, batch: Batch, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One iteration: K images of each of P prompts, and the updates they give rise to.

    Args:
      program: static.
      state: donated when compiled.
      frozen: everything that does not learn.
      batch: the P prompts.
      key: the run's key; the iteration's is folded from it and `state.step`.

    Returns:
      The next state, and scalars named as in the metric files.
    """
    key = jax.random.fold_in(key, state.step)
    trajectory = rollout(program, state.params, frozen, batch, key)
    experience = score(program, frozen, batch, trajectory)
    state, metrics = update(program, state, frozen, batch, experience)
    return state, {**experience.metrics, **metrics}


def rollout(
    program: Program, params: PyTree, frozen: Frozen, batch: Batch, key: Array
) -> Trajectory:
    """Samples K paths for each prompt with the current policy; N = P * K, group by group."""
    sampler, size = program.config.sampler, program.config.batch.group_size
    conditioning = repeat_groups(batch.conditioning, size)
    count = batch.prompt_ids.shape[0] * size
    x_1 = jax.random.normal(jax.random.fold_in(key, 0), (count, *program.latent_shape))
    return sample(
        program.guide(sampler.guidance, frozen.negative),
        bind(program.config.trainable, params, frozen.transformer),
        x_1,
        conditioning,
        sigmas=program.sigmas,
        kernel=sampler.kernel,
        noise_level=sampler.noise_level,
        stochastic=program.stochastic,
        key=jax.random.fold_in(key, 1),
        storage_dtype=jnp.dtype(sampler.storage_dtype),
    )


def score(program: Program, frozen: Frozen, batch: Batch, trajectory: Trajectory) -> Rollout:
    """Decodes the images, some groups at a time, and measures what they are worth.

    Returns:
      The rollout with rewards [P, K] and surprisals [P, K], and the metrics of both.
    """
    config = program.config
    num_groups, size = batch.prompt_ids.shape[0], config.batch.group_size
    x_0 = trajectory.x_0.reshape(num_groups, size, *program.latent_shape)
    reward_params = frozen.reward_params(program.reward_encoder)

    def score_groups(chunk):
        x_0, inputs = chunk  # [g, K, h, w, C]
        images = program.decode(frozen.vae, x_0.reshape(-1, *program.latent_shape))
        grouped = images.reshape(*x_0.shape[:2], *images.shape[1:])
        total, parts = program.reward.score(reward_params, grouped, inputs)
        encoder = config.perception.encoder
        # Written as the rewards write it, so that an encoder that is also a reward runs once.
        flat = as_8bit(grouped).reshape(images.shape)
        features = program.features[encoder](frozen.encoders[encoder], flat)
        return {
            "total": total,
            "parts": parts,
            "features": features.reshape(*x_0.shape[:2], -1),
            "pixel_variance": perceptual_variance(grouped.reshape(*x_0.shape[:2], -1)),
        }

    chunk_size = config.batch.decode_groups or num_groups
    scored = _map_chunks(score_groups, (x_0, batch.reward_inputs), num_groups // chunk_size)
    surprisal = program.surprisal(scored["features"])
    unit = scale_features(scored["features"], "unit")
    logp = trajectory.logp[program.trained_steps]
    metrics = {
        "reward/mean": jnp.mean(scored["total"]),
        "reward/std": jnp.mean(jnp.std(scored["total"], axis=1)),
        **{f"reward/{name}": jnp.mean(part) for name, part in scored["parts"].items()},
        "entropy/policy": jnp.mean(policy_entropy(program.step_std())),
        "entropy/policy_mc": -jnp.mean(logp),
        "entropy/perceptual": jnp.mean(surprisal),
        "diversity/variance_perceptual": jnp.mean(perceptual_variance(unit)),
        "diversity/variance_latent": jnp.mean(
            perceptual_variance(x_0.reshape(num_groups, size, -1))
        ),
        "diversity/variance_pixel": jnp.mean(scored["pixel_variance"]),
    }
    return Rollout(
        trajectory=trajectory, rewards=scored["total"], surprisal=surprisal, metrics=metrics
    )


def _map_chunks(function: Callable, tree: PyTree, chunks: int) -> PyTree:
    """`function` over `chunks` pieces of the leading axis one after another, to bound memory."""
    if chunks == 1:
        return function(tree)

    def split(a):  # strided for the same reason as the micro-batches
        return jnp.moveaxis(a.reshape(-1, chunks, *a.shape[1:]), 1, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, tree)))
