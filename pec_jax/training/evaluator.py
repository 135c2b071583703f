"""Held-out evaluation: quality and diversity of N images of each prompt.

| name | definition |
|---|---|
| `quality/<reward>` | mean of the reward over all images, or of what it measures instead |
| `failures/<reward>` | share of the images that it could not judge, where there are any |
| `diversity/<encoder>`, `diversity/vendi_<encoder>`, ... | see `evaluation.summary` |
| `diversity/<reward>` | by the reward; `attributes`: entropy of what a prompt leaves open |
| `entropy/<estimator>_<encoder>` | perceptual entropy, nats per dimension, of the images |
| `entropy/output` | entropy of the latents given the prompt, nats per dimension, along the ODE |
| `entropy/output_error` | its standard error over prompts |
| `distance/frechet_<encoder>` | Fréchet distance of all images' features from the base model's |

Those of quality and diversity are means over prompts; `<name>/low` and `<name>/high` bound their
95% bootstrap interval over prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from pec_jax.data.embeddings import PromptTable
from pec_jax.data.stream import repeat_groups
from pec_jax.distributed import processes
from pec_jax.distributed.mesh import over_batch, put_replicated
from pec_jax.evaluation import metrics
from pec_jax.evaluation.summary import summarise
from pec_jax.flow.likelihood import mean_and_error, output_log_prob
from pec_jax.flow.sampler import FlowSampler
from pec_jax.perception.spaces import estimators
from pec_jax.rl.advantages import known_mean
from pec_jax.rl.policy import Policy
from pec_jax.training.build import Experiment, reached_std
from pec_jax.types import Batch, Frozen, PyTree


def evaluation_policy(experiment: Experiment) -> Policy:
    """The policy as it is evaluated: by the ODE, with its own steps and guidance."""
    config, policy = experiment.config.eval, experiment.program.learner.policy
    sigmas = experiment.pipeline.sigmas(config.num_steps, policy.latent_shape)
    return dataclasses.replace(policy, guidance=config.guidance, sampler=FlowSampler(sigmas))


def image_function(experiment: Experiment, num_images: int) -> Callable[..., Array]:
    """(params, frozen, batch, key) -> images [P, num_images, H, W, 3] in [0, 1], by the ODE."""
    policy, decode = evaluation_policy(experiment), experiment.program.scorer.decode

    def draw(params: PyTree, frozen: Frozen, batch: Batch, key: Array) -> Array:
        num_prompts = batch.prompt_ids.shape[0]
        x_1 = jax.random.normal(key, (num_prompts * num_images, *policy.latent_shape))
        conditioning = over_batch(repeat_groups(batch.conditioning, num_images))
        actor = policy.before(frozen, conditioning)
        latents = policy.sampler.final(actor.velocity(params), over_batch(x_1), None)
        images = decode(frozen.vae, latents)
        return images.reshape(num_prompts, num_images, *images.shape[1:])

    return draw


class Evaluation(NamedTuple):
    """What an evaluation says, and what later ones are compared with."""

    numbers: dict[str, float]
    moments: dict[str, metrics.Moments]  # of the features in each encoder's space


class Evaluator:
    """Draws and measures images of fixed prompts from fixed noise.

    Evaluation and sample grids share one compiled sampler: both draw `eval.groups` prompts times
    `eval.images_per_prompt` images at once.
    """

    def __init__(self, experiment: Experiment, key: Array, mesh: Mesh):
        """`key` lies on every device of `mesh`, as do the arguments of all calls."""
        self._experiment, self._key, self._mesh = experiment, key, mesh
        self._config = experiment.config.eval
        starts = range(0, len(experiment.tables["heldout"]), self._config.groups)
        self._keys = {start: jax.random.fold_in(key, start) for start in starts}
        self._draw = jax.jit(image_function(experiment, self._config.images_per_prompt))
        self._measure = jax.jit(measure_function(experiment))
        self._entropies = jax.jit(entropy_function(experiment))
        self._output_entropy = jax.jit(output_entropy_function(experiment))

    def __call__(
        self,
        params: PyTree,
        frozen: Frozen,
        base: Mapping[str, metrics.Moments] | None = None,
    ) -> Evaluation:
        """Measures on the held-out prompts; see the table at the top of this file.

        Args:
            params: of the policy.
            frozen: all else.
            base: the base model's moments, for the distances from it; None leaves them out.
        """
        table, batches = self._experiment.tables["heldout"], []
        for start, key in self._keys.items():
            batch = self._batch(table, start)
            images = self._draw(params, frozen, batch, key)
            batches.append(processes.fetch(self._measure(frozen, batch, images)))
        joined = jax.tree.map(lambda *a: np.concatenate(a)[: len(table)], *batches)
        features = put_replicated(joined["features"], self._mesh)
        entropies = jax.device_get(self._entropies(features))
        numbers = summarise(joined["scores"], joined["features"], joined["diversities"])
        numbers |= {name: float(value) for name, value in entropies.items()}
        moments = {name: metrics.moments(value) for name, value in joined["features"].items()}
        for name, before in sorted((base or {}).items()):  # read from a file, in any order
            distance = metrics.frechet_distance(moments[name], before)
            numbers[f"distance/frechet_{name}"] = distance
        return Evaluation(numbers, moments)

    def output_entropy(self, params: PyTree, frozen: Frozen) -> dict[str, float]:
        """Entropy of what is drawn, on the first `eval.groups` held-out prompts."""
        if not self._config.entropy_probes:
            return {}
        batch = self._batch(self._experiment.tables["heldout"], 0)
        value, error = jax.device_get(self._output_entropy(params, frozen, batch, self._key))
        return {"entropy/output": float(value), "entropy/output_error": float(error)}

    def sample_grid(self, params: PyTree, frozen: Frozen) -> np.ndarray:
        """Images [rows, columns, H, W, 3] in [0, 1] of the sample prompts."""
        table = self._experiment.tables["samples"]
        images = processes.fetch(self._draw(params, frozen, self._batch(table, 0), self._key))
        return images[: len(table), : self._config.sample_columns]

    def _batch(self, table: PromptTable, start: int) -> Batch:
        ids = np.arange(start, start + self._config.groups) % len(
            table
        )  # the last batch wraps around
        return put_replicated(table.gather(ids), self._mesh)


def entropy_function(experiment: Experiment) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Raw features {encoder: [P, N, d]} -> {"entropy/<estimator>_<encoder>": H_perc []}."""
    config = experiment.config
    known = estimators(config.perception, reached_std(experiment.program.learner.policy.sampler))
    # A group of the evaluation may be too small for the k that training uses.
    if config.perception.k >= config.eval.images_per_prompt:
        known.pop("knn")

    def entropies(features: dict[str, Array]) -> dict[str, Array]:
        return {
            f"entropy/{name}_{encoder}": known_mean(estimate(value))
            for name, estimate in known.items()
            for encoder, value in features.items()
        }

    return entropies


def output_entropy_function(experiment: Experiment) -> Callable[..., tuple[Array, Array]]:
    """(params, frozen, batch, key) -> entropy of the latents and its error, of P x N images."""
    policy, config = evaluation_policy(experiment), experiment.config.eval

    def entropy(params: PyTree, frozen: Frozen, batch: Batch, key: Array) -> tuple[Array, Array]:
        shape = batch.prompt_ids.shape[0], config.images_per_prompt
        noise, probes = jax.random.split(key)
        x_1 = jax.random.normal(noise, (shape[0] * shape[1], *policy.latent_shape))
        conditioning = over_batch(repeat_groups(batch.conditioning, shape[1]))
        log_prob, _ = output_log_prob(
            policy.before(frozen, conditioning).velocity(params),
            over_batch(x_1),
            sigmas=policy.sampler.sigmas,
            key=probes,
            num_probes=config.entropy_probes,
        )
        return mean_and_error(log_prob.reshape(shape))

    return entropy


def measure_function(experiment: Experiment) -> Callable[..., dict[str, PyTree]]:
    """(frozen, batch, images [P, N, H, W, 3]) -> the arguments of `summarise`."""

    def measure(frozen: Frozen, batch: Batch, images: Array) -> dict[str, PyTree]:
        measured = experiment.rewards.measure(frozen.networks, images, batch.reward_inputs)
        features = {
            name: space.of_images(frozen, images) for name, space in experiment.spaces.items()
        }
        return {
            "scores": measured.scores,
            "features": features,
            "diversities": measured.diversities,
        }

    return measure
