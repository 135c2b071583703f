"""Held-out evaluation: quality and diversity of N images of each prompt.

| name | definition |
|---|---|
| `quality/<reward>` | mean of the reward over all images |
| `diversity/<encoder>` | mean pairwise Euclidean distance of a prompt's raw features |
| `diversity/vendi_<encoder>` | Vendi score of a prompt's images, cosine kernel |
| `diversity/variance_<encoder>` | mean squared distance of unit features to their group's mean |
| `entropy/<estimator>_<encoder>` | perceptual entropy, nats per dimension, of the images |
| `entropy/output` | entropy of the latents given the prompt, nats per dimension, along the ODE |
| `entropy/output_error` | its standard error over prompts |

The first four are means over prompts; `<name>/low` and `<name>/high` bound their 95% bootstrap
interval over prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pec_jax.data.embeddings import PromptTable
from pec_jax.data.stream import repeat_groups
from pec_jax.distributed import processes as hosts
from pec_jax.distributed.mesh import over_batch, put_replicated
from pec_jax.evaluation import metrics
from pec_jax.flow.likelihood import mean_and_error, output_log_prob
from pec_jax.flow.sampler import sample_ode
from pec_jax.perception.entropy import perceptual_variance, scale_features
from pec_jax.rewards.base import as_8bit
from pec_jax.rl.program import Frozen, bind
from pec_jax.training.build import World, estimator_functions
from pec_jax.types import Array, Batch, PyTree


def image_function(world: World, num_images: int) -> Callable[..., Array]:
    """(params, frozen, batch, key) -> images [P, num_images, H, W, 3] in [0, 1], by the ODE."""
    program, config = world.program, world.config.eval
    sigmas = world.pipeline.sigmas(config.num_steps, program.latent_shape)

    def draw(params: PyTree, frozen: Frozen, batch: Batch, key: Array) -> Array:
        num_prompts = batch.prompt_ids.shape[0]
        latents = sample_ode(
            program.guide(config.guidance, frozen.negative),
            bind(program.config.trainable, params, frozen.transformer),
            over_batch(jax.random.normal(key, (num_prompts * num_images, *program.latent_shape))),
            over_batch(repeat_groups(batch.conditioning, num_images)),
            sigmas=sigmas,
        )
        images = program.decode(frozen.vae, latents)
        return images.reshape(num_prompts, num_images, *images.shape[1:])

    return draw


class Evaluator:
    """Draws and measures images of fixed prompts from fixed noise.

    Evaluation and sample grids share one compiled sampler: both draw `eval.groups` prompts times
    `eval.images_per_prompt` images at once.
    """

    def __init__(self, world: World, key: Array, mesh: Mesh):
        """`key` lies on every device of `mesh`, as do the arguments of all calls."""
        self._world, self._key, self._mesh = world, key, mesh
        self._groups = world.config.eval.groups
        starts = range(0, len(world.heldout), self._groups)
        self._keys = {start: jax.random.fold_in(key, start) for start in starts}
        self._draw = jax.jit(image_function(world, world.config.eval.images_per_prompt))
        self._measure = jax.jit(measure_function(world))
        self._entropies = jax.jit(entropy_function(world))
        self._output_entropy = jax.jit(output_entropy_function(world))

    def __call__(self, params: PyTree, frozen: Frozen) -> dict[str, float]:
        """Metric -> number on the held-out prompts; see the table at the top of this file."""
        table, batches = self._world.heldout, []
        for start, key in self._keys.items():
            batch = self._batch(table, start)
            images = self._draw(params, frozen, batch, key)
            batches.append(hosts.fetch(self._measure(frozen, batch, images)))
        joined = jax.tree.map(lambda *a: np.concatenate(a)[: len(table)], *batches)
        features = put_replicated(joined["features"], self._mesh)
        entropies = jax.device_get(self._entropies(features))
        return summarise(joined["scores"], joined["features"]) | {
            name: float(value) for name, value in entropies.items()
        }

    def output_entropy(self, params: PyTree, frozen: Frozen) -> dict[str, float]:
        """Entropy of what is drawn, on the first `eval.groups` held-out prompts."""
        if not self._world.config.eval.entropy_probes:
            return {}
        batch = self._batch(self._world.heldout, 0)
        value, error = jax.device_get(self._output_entropy(params, frozen, batch, self._key))
        return {"entropy/output": float(value), "entropy/output_error": float(error)}

    def sample_grid(self, params: PyTree, frozen: Frozen) -> np.ndarray:
        """Images [rows, columns, H, W, 3] in [0, 1] of the sample prompts."""
        table, config = self._world.samples, self._world.config.eval
        images = hosts.fetch(self._draw(params, frozen, self._batch(table, 0), self._key))
        return images[: len(table), : config.sample_columns]

    def _batch(self, table: PromptTable, start: int) -> Batch:
        ids = np.arange(start, start + self._groups) % len(table)  # the last batch wraps around
        return put_replicated(table.gather(ids), self._mesh)


def entropy_function(world: World) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Raw features {encoder: [P, N, d]} -> {"entropy/<estimator>_<encoder>": H_perc []}."""
    estimators = estimator_functions(world.config, world.program.step_std())
    # A group of the evaluation may be too small for the k that training uses.
    if world.config.perception.k >= world.config.eval.images_per_prompt:
        estimators.pop("knn")

    def entropies(features: dict[str, Array]) -> dict[str, Array]:
        return {
            f"entropy/{name}_{encoder}": jnp.mean(estimate(value))
            for name, estimate in estimators.items()
            for encoder, value in features.items()
        }

    return entropies


def output_entropy_function(world: World) -> Callable[..., tuple[Array, Array]]:
    """(params, frozen, batch, key) -> entropy of the latents and its error, of P x N images."""
    program, config = world.program, world.config.eval
    sigmas = world.pipeline.sigmas(config.num_steps, program.latent_shape)

    def entropy(params: PyTree, frozen: Frozen, batch: Batch, key: Array) -> tuple[Array, Array]:
        shape = batch.prompt_ids.shape[0], config.images_per_prompt
        noise, probes = jax.random.split(key)
        log_prob, _ = output_log_prob(
            program.guide(config.guidance, frozen.negative),
            bind(program.config.trainable, params, frozen.transformer),
            over_batch(jax.random.normal(noise, (shape[0] * shape[1], *program.latent_shape))),
            over_batch(repeat_groups(batch.conditioning, shape[1])),
            sigmas=sigmas,
            key=probes,
            num_probes=config.entropy_probes,
        )
        return mean_and_error(log_prob.reshape(shape))

    return entropy


def measure_function(world: World) -> Callable[..., dict[str, PyTree]]:
    """(frozen, batch, images [P, N, H, W, 3]) -> scores {reward: [P, N]}, features [P, N, d]."""

    def measure(frozen: Frozen, batch: Batch, images: Array) -> dict[str, PyTree]:
        params = frozen.reward_params(world.all_reward_encoders)
        _, scores = world.all_rewards.score(params, images, batch.reward_inputs)
        flat = as_8bit(images).reshape(-1, *images.shape[2:])
        features = {
            name: encode(frozen.encoders[name], flat).reshape(*images.shape[:2], -1)
            for name, encode in world.program.features.items()
        }
        return {"scores": scores, "features": features}

    return measure


@jax.jit
def _unit_variance(features: Array) -> Array:
    return perceptual_variance(scale_features(features, "unit"))


def summarise(scores: dict[str, np.ndarray], features: dict[str, np.ndarray]) -> dict[str, float]:
    """Numbers and intervals from scores {reward: [P, N]} and raw features {encoder: [P, N, d]}."""
    per_prompt = {f"quality/{name}": value.mean(axis=1) for name, value in scores.items()}
    for name, value in features.items():
        per_prompt[f"diversity/{name}"] = metrics.mean_pairwise_distance(value)
        per_prompt[f"diversity/vendi_{name}"] = metrics.vendi_score(value)
        variance = _unit_variance(jax.device_put(value))
        per_prompt[f"diversity/variance_{name}"] = jax.device_get(variance)
    result: dict[str, float] = {}
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
