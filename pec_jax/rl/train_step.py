"""THE train step: rollout -> decode -> reward -> surprisal -> advantage -> update.

`train_step(program, state, frozen, batch, key) -> (state, metrics)` is compiled once. It is
composed of `rollout`, `score` and `update`, which are public, pure and tested by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pec_jax.data.stream import repeat_groups
from pec_jax.distributed.mesh import over_batch
from pec_jax.flow.sampler import image_keys, sample, swap_images_and_steps
from pec_jax.flow.transition import policy_entropy
from pec_jax.perception.entropy import perceptual_variance, scale_features
from pec_jax.rewards.base import as_8bit
from pec_jax.rl.program import Frozen, Program, bind
from pec_jax.rl.update import update
from pec_jax.types import Array, Batch, PyTree, Rollout, TrainState, Trajectory


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
    state, metrics = update(program, state, frozen, batch, experience, jax.random.fold_in(key, 2))
    return state, {**experience.metrics, **metrics}


def base_entropy(
    program: Program, params: PyTree, frozen: Frozen, batch: Batch, key: Array
) -> Array:
    """H_perc [] of one batch of prompts under the policy, as the constraint measures it."""
    experience = score(program, frozen, batch, rollout(program, params, frozen, batch, key))
    return jnp.mean(experience.surprisal)


def rollout(
    program: Program, params: PyTree, frozen: Frozen, batch: Batch, key: Array
) -> Trajectory:
    """Samples K paths for each prompt with the current policy; N = P * K, group by group.

    `batch.rollout_images` of every group at a time; what is drawn does not depend on it.
    """
    sampler, size = program.config.sampler, program.config.batch.group_size
    num_groups = batch.prompt_ids.shape[0]
    variables = bind(program.config.trainable, params, frozen.transformer)
    noise, steps = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    x_1 = over_batch(jax.random.normal(noise, (num_groups, size, *program.latent_shape)))
    keys = image_keys(steps, num_groups * size).reshape(num_groups, size)

    def draw(chunk):  # some images of every group: [P, k, ...]
        x_1, keys = chunk
        images = x_1.shape[1]
        trajectory = sample(
            program.guide(sampler.guidance, frozen.negative),
            variables,
            over_batch(x_1.reshape(-1, *program.latent_shape)),
            over_batch(repeat_groups(batch.conditioning, images)),
            sigmas=program.sigmas,
            kernel=sampler.kernel,
            noise_level=sampler.noise_level,
            stochastic=program.stochastic,
            key=keys.reshape(-1),
            storage_dtype=jnp.dtype(sampler.storage_dtype),
            keep_predictions=program.config.perception.at == "steps",
        )
        return jax.tree.map(
            lambda a: a.reshape(num_groups, images, *a.shape[1:]),
            swap_images_and_steps(trajectory),
        )

    drawn = map_images(draw, (x_1, keys), program.config.batch.rollout_images)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), drawn)
    return swap_images_and_steps(flat)


def score(program: Program, frozen: Frozen, batch: Batch, trajectory: Trajectory) -> Rollout:
    """Decodes the images, some of every group at a time, and measures what they are worth.

    Returns:
      The rollout with rewards [P, K] and surprisals [P, K] ([S, P, K] where perception looks at
      the steps), and the metrics of both.
    """
    config = program.config
    num_groups, size = batch.prompt_ids.shape[0], config.batch.group_size
    x_0 = trajectory.x_0.reshape(num_groups, size, *program.latent_shape)
    reward_params = frozen.reward_params(program.reward_encoder)

    def score_images(x_0):  # [P, k, h, w, C]
        images = decode(program, frozen, x_0)
        total, parts = program.reward.score(reward_params, images, batch.reward_inputs)
        return {
            "total": total,
            "parts": parts,
            "features": image_features(program, frozen, images),
            "levels": jnp.round(images * 255).astype(jnp.uint8),
        }

    scored = map_images(score_images, x_0, config.batch.decode_images)
    surprisal = program.surprisal(scored["features"])
    rewards = scored["total"]
    metrics = {
        "reward/mean": jnp.mean(rewards),
        "reward/std": jnp.mean(jnp.std(rewards, axis=1)),
        **{f"reward/{name}": jnp.mean(part) for name, part in scored["parts"].items()},
        "entropy/policy": jnp.mean(policy_entropy(program.step_std())),
        "entropy/policy_mc": -jnp.mean(trajectory.logp[program.trained_steps]),
        "entropy/perceptual": jnp.mean(surprisal),
        "diversity/variance_reward": jnp.mean(jnp.var(rewards, axis=1)),
        "diversity/variance_perceptual": _unit_variance(program, scored["features"]),
        "diversity/variance_latent": jnp.mean(
            perceptual_variance(x_0.reshape(num_groups, size, -1))
        ),
        "diversity/variance_pixel": _pixel_variance(scored["levels"]),
    }
    if config.perception.at == "steps":
        surprisal = step_surprisal(program, frozen, trajectory, num_groups)
        metrics["entropy/perceptual_steps"] = jnp.mean(surprisal)
    return Rollout(trajectory=trajectory, rewards=rewards, surprisal=surprisal, metrics=metrics)


def decode(program: Program, frozen: Frozen, latents: Array) -> Array:
    """Latents [g, K, h, w, C] -> images [g, K, H, W, 3] in [0, 1]."""
    images = program.decode(frozen.vae, over_batch(latents.reshape(-1, *program.latent_shape)))
    return images.reshape(*latents.shape[:2], *images.shape[1:])


def image_features(program: Program, frozen: Frozen, images: Array) -> dict[str, Array]:
    """Images [g, K, H, W, 3] -> raw features {encoder: [g, K, d]}."""
    # Written as the rewards write it, so that an encoder that is also a reward runs once.
    flat = as_8bit(images).reshape(-1, *images.shape[2:])
    return {
        name: program.features[name](frozen.encoders[name], flat).reshape(*images.shape[:2], -1)
        for name in program.spaces
    }


def step_surprisal(
    program: Program, frozen: Frozen, trajectory: Trajectory, num_groups: int
) -> Array:
    """Surprisals [S, P, K] of what each trained step predicts the image to be."""
    assert trajectory.x_0_hat is not None  # `rollout` keeps them where perception is at the steps
    predictions = trajectory.x_0_hat[program.trained_steps]  # [S, P * K, h, w, C]

    def one_step(x_0_hat):
        features = map_images(
            lambda part: image_features(program, frozen, decode(program, frozen, part)),
            x_0_hat.reshape(num_groups, -1, *program.latent_shape),
            program.config.batch.decode_images,
        )
        return program.surprisal(features)

    return jax.lax.map(one_step, predictions)


def _unit_variance(program: Program, features: Mapping[str, Array]) -> Array:
    """Variance of the unit features within a prompt, the encoders' mean by their shares."""
    parts = [
        share * jnp.mean(perceptual_variance(scale_features(features[name], "unit")))
        for name, share in program.spaces.items()
    ]
    return jnp.sum(jnp.stack(parts))


def _pixel_variance(levels: Array) -> Array:
    """Mean over prompts of the images' variance, summed over pixels; levels [P, K, H, W, 3] uint8.

    E x^2 - (E x)^2 and not the squared distances: in this form nothing of the images' size in
    float32 is kept, and levels are whole numbers, whose sums over a group are exact.
    """
    x = levels.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x), axis=1) - jnp.square(jnp.mean(x, axis=1))
    return jnp.mean(jnp.sum(variance, axis=(1, 2, 3))) / 255**2


def map_images(function: Callable, tree: PyTree, images: int) -> PyTree:
    """`function` over arrays [P, K, ...], `images` of every group at a time, to bound memory.

    Args:
      function: from a tree of arrays [P, k, ...] to another one.
      tree: arrays [P, K, ...].
      images: k, a divisor of K; 0 is all.

    Returns:
      What `function` returns, [P, K, ...].
    """
    size = jax.tree.leaves(tree)[0].shape[1]
    if images in (0, size):
        return function(tree)

    def split(a):  # [P, K, ...] -> [C, P, k, ...]
        pieces = a.reshape(a.shape[0], -1, images, *a.shape[2:])
        return over_batch(jnp.moveaxis(pieces, 1, 0), axis=1)

    def join(a):
        a = jnp.moveaxis(a, 0, 1)
        return over_batch(a.reshape(a.shape[0], size, *a.shape[3:]))

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, tree)))
