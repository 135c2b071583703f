"""Held-out evaluation: quality and diversity of N images of each prompt.

| name | definition |
|---|---|
| `quality/<reward>` | mean of the reward over all images |
| `diversity/<encoder>` | mean pairwise Euclidean distance of a prompt's raw features |
| `diversity/vendi_<encoder>` | Vendi score of a prompt's images, cosine kernel |
| `diversity/variance_<encoder>` | mean squared distance of unit features to their group's mean |

All are means over prompts; `<name>/low` and `<name>/high` bound the 95% bootstrap interval over
prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.assemble import World
from pec_jax.data.pipeline import repeat_groups
from pec_jax.evaluation import metrics
from pec_jax.flow.sampler import guided, sample_ode
from pec_jax.flow.schedule import from_scheduler_config
from pec_jax.perception.entropy import perceptual_variance, scale_features
from pec_jax.program import Frozen, bind
from pec_jax.rewards.base import as_8bit
from pec_jax.types import Array, Batch, PyTree


def image_function(world: World, num_images: int) -> Callable[..., Array]:
    """(params, frozen, batch, key) -> images [P, num_images, H, W, 3] in [0, 1], by the ODE."""
    program, config = world.program, world.config.eval
    h, w, _ = program.latent_shape
    tokens = h * w // world.pipeline.transformer.config.patch_size**2
    sigmas = from_scheduler_config(world.pipeline.scheduler, config.num_steps, tokens)

    def draw(params: PyTree, frozen: Frozen, batch: Batch, key: Array) -> Array:
        num_prompts = batch.prompt_ids.shape[0]
        latents = sample_ode(
            guided(program.velocity_fn, config.guidance, frozen.negative),
            bind(program.config.trainable, params, frozen.transformer),
            jax.random.normal(key, (num_prompts * num_images, *program.latent_shape)),
            repeat_groups(batch.conditioning, num_images),
            sigmas=sigmas,
        )
        images = program.decode(frozen.vae, latents)
        return images.reshape(num_prompts, num_images, *images.shape[1:])

    return draw


class Sampler:
    """Draws the images of the sample grids: the same prompts and the same noise each time."""

    def __init__(self, world: World, key: Array):
        self._draw = jax.jit(image_function(world, world.config.eval.sample_columns))
        self._batch = world.samples.gather(np.arange(len(world.samples)))
        self._key = key

    def __call__(self, params: PyTree, frozen: Frozen) -> np.ndarray:
        """Images [rows, columns, H, W, 3] in [0, 1]."""
        return np.asarray(self._draw(params, frozen, self._batch, self._key))


class Evaluator:
    """Evaluates parameters on the held-out prompts with fixed seeds; compiled once."""

    def __init__(self, world: World, key: Array):
        self._groups = min(world.config.eval.groups, len(world.heldout))
        self._table, self._key = world.heldout, key
        draw = image_function(world, world.config.eval.images_per_prompt)

        def measure(params: PyTree, frozen: Frozen, batch: Batch, key: Array) -> dict[str, Array]:
            images = draw(params, frozen, batch, key)
            _, scores = world.all_rewards.score(
                frozen.reward_params(world.all_reward_encoders), images, batch.reward_inputs
            )
            flat = as_8bit(images).reshape(-1, *images.shape[2:])
            features = {
                name: encode(frozen.encoders[name], flat).reshape(*images.shape[:2], -1)
                for name, encode in world.program.features.items()
            }
            return {"scores": scores, "features": features}

        self._measure = jax.jit(measure)

    def __call__(self, params: PyTree, frozen: Frozen) -> dict[str, float]:
        """Metric -> number, with counts; see the table at the top of this file."""
        size, batches = len(self._table), []
        for start in range(0, size, self._groups):
            ids = np.arange(start, start + self._groups) % size  # the last batch wraps around
            key = jax.random.fold_in(self._key, start)
            measured = self._measure(params, frozen, self._table.gather(ids), key)
            batches.append(jax.device_get(measured))
        joined = jax.tree.map(lambda *a: np.concatenate(a)[:size], *batches)
        return summarise(joined["scores"], joined["features"])


def summarise(scores: dict[str, np.ndarray], features: dict[str, np.ndarray]) -> dict[str, float]:
    """Numbers and intervals from scores {reward: [P, N]} and raw features {encoder: [P, N, d]}."""
    per_prompt = {f"quality/{name}": value.mean(axis=1) for name, value in scores.items()}
    for name, value in features.items():
        per_prompt[f"diversity/{name}"] = metrics.mean_pairwise_distance(value)
        per_prompt[f"diversity/vendi_{name}"] = metrics.vendi_score(value)
        unit = scale_features(jnp.asarray(value), "unit")
        per_prompt[f"diversity/variance_{name}"] = np.asarray(perceptual_variance(unit))
    result = {}
    for name, values in per_prompt.items():
        interval = metrics.bootstrap_interval(values, seed=0)
        result |= {
            name: float(values.mean()),
            f"{name}/low": float(interval.low),
            f"{name}/high": float(interval.high),
        }
    first = next(iter(features.values()))
    result["count/prompts"], result["count/images_per_prompt"] = first.shape[:2]
    return result
