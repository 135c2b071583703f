"""From a Config to what runs: models loaded, prompts encoded, functions bound.

The only module that knows all the others' constructors. What it returns is data and pure
functions; nothing below it reads a file again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from jaxtyping import Array

from pec_jax.config import Config, ConfigError
from pec_jax.config.registry import ENCODERS
from pec_jax.config.schema import SamplerConfig
from pec_jax.data import encode_prompts
from pec_jax.data.embeddings import Embeddings, PromptTable
from pec_jax.data.prompts import NEGATIVE, Prompt, check_text, load_prompts
from pec_jax.distributed.mesh import Placement
from pec_jax.families.base import Pipeline
from pec_jax.families.locate import pipeline_directory, prompt_file, transformer_path
from pec_jax.families.pipeline import load_pipeline
from pec_jax.flow.sampler import FlowSampler
from pec_jax.flow.window import Motion, stochastic_steps
from pec_jax.models import lora
from pec_jax.perception.networks import Networks
from pec_jax.perception.spaces import shares, surprisal_function
from pec_jax.rewards.combined import CombinedReward, make_rewards
from pec_jax.rl.average import Average
from pec_jax.rl.policy import Policy
from pec_jax.rl.rollout import Drawing
from pec_jax.rl.score import Scorer, Space
from pec_jax.rl.train_step import Program
from pec_jax.rl.update import Learner
from pec_jax.training import warm_start
from pec_jax.training.parts import make_constraints, make_objective, make_optimizer
from pec_jax.types import Conditioning, Frozen, PyTree
from pec_jax.weights.convert import logical_axes
from pec_jax.weights.hub import model_path

# What the run's key is folded with for each use, so that no two share random numbers; 0 is that of
# a new LoRA.
TRAIN_STREAM, EVAL_STREAM, BASE_STREAM = range(1, 4)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run or an evaluation needs.

    Attributes:
        config: of the run.
        pipeline: what is fine-tuned.
        program: the static half of the train step.
        frozen: every array that does not learn.
        params: what learns, as it is before training.
        param_axes: the logical axes of each of them.
        rewards: also those that are only evaluated.
        spaces: perceptual spaces, also those that are only evaluated.
        prompts: "train", "heldout" and "samples", with their texts.
        tables: the same as rows for the train step.
    """

    config: Config
    pipeline: Pipeline
    program: Program
    frozen: Frozen
    params: PyTree
    param_axes: PyTree
    rewards: CombinedReward
    spaces: dict[str, Space]
    prompts: dict[str, list[Prompt]]
    tables: dict[str, PromptTable]


@dataclasses.dataclass(frozen=True)
class Judges:
    """Who measures images: rewards and perceptual spaces, trained on or only evaluated."""

    rewards: CombinedReward
    spaces: dict[str, Space]


def build(config: Config, place: Placement | None = None) -> Experiment:
    """Loads and builds everything; a mistake in the config is reported before anything is slow.

    Args:
        config: the run's.
        place: where weights go; None leaves them on the host, or on the default device.

    Raises:
        ConfigError: a name that does not exist, or methods that do not go together.
        ValueError: from the loaders: what was wrong in which file.
    """
    check(config)
    prompts = load_prompt_sets(config)
    model = config.model
    root = pipeline_directory(model.path, model.variant, model.transformer)
    start = warm_start.open_start(config, root)
    pipeline = load_model(config, root, place)
    networks = Networks(
        own=root / "encoders",
        locate=model_path,
        dtype=jnp.dtype(model.encoder_dtype),
        rounding=model.encoder_resize,
        place=place,
    )
    judges = make_judges(config, networks)
    program = make_program(config, pipeline, judges)
    tables, negative = _encode(config, root, prompts, (pipeline, judges.rewards, networks))
    frozen = Frozen(
        transformer=pipeline.transformer_variables,
        vae=pipeline.vae_variables,
        negative=negative,
        # Nobody encodes a text any more, and the memory of what does is wanted.
        networks=networks.without_text(),
    )
    pipeline = dataclasses.replace(pipeline, text=None)
    params = warm_start.initial_params(config, pipeline, start)
    return Experiment(
        config=config,
        pipeline=pipeline,
        program=program,
        frozen=frozen,
        params=params,
        param_axes=trainable_axes(config, pipeline, params),
        rewards=judges.rewards,
        spaces=judges.spaces,
        prompts=prompts,
        tables=tables,
    )


def check(config: Config) -> None:
    """Raises ConfigError for methods that do not go together; reads no file."""
    objective = make_objective(config)
    constraints = make_constraints(config, objective)
    # Whether a step has noise does not depend on where the schedule of a model has it.
    sigmas = np.linspace(1.0, 0.0, config.sampler.num_steps + 1, dtype=np.float32)
    objective.check(make_sampler(config.sampler, sigmas))
    shares(config.perception)
    if config.perception.at == "steps" and not objective.needs_paths:
        raise ConfigError(
            "config.perception.at is 'steps', but the objective "
            f"{config.objective.name!r} keeps no steps: use 'final'."
        )
    if constraints.pays_surprisal and config.batch.group_size < 3:
        raise ConfigError(
            "config.batch.group_size is 2: of two images, both are equally surprising, so that a "
            "perceptual constraint would do nothing. Take at least 3."
        )


def load_prompt_sets(config: Config) -> dict[str, list[Prompt]]:
    """The prompts to train on, to evaluate on, and of the sample grids."""
    for text in config.prompts.samples:
        check_text(text)
    heldout = list(load_prompts(prompt_file(config.prompts.heldout, "test")))
    heldout = heldout[: config.eval.num_prompts or None]
    sampled = [Prompt(text, {}) for text in config.prompts.samples] or heldout
    train = list(load_prompts(prompt_file(config.prompts.train)))
    for name, prompts in (("train", train), ("heldout", heldout)):
        if count := sum(bool(prompt.negative) for prompt in prompts):
            logging.warning(
                f"{count} of {len(prompts)} prompts of config.prompts.{name} have a {NEGATIVE}, "
                "which is not used: guidance steers away from the empty prompt here."
            )
    return {
        "train": train,
        "heldout": heldout,
        "samples": sampled[: config.eval.sample_rows],
    }


def load_model(
    config: Config, root: Path, place: Placement | None, *, weights: bool = True
) -> Pipeline:
    """The pipeline in `root` as the config wants it; see `families.pipeline.load_pipeline`."""
    model = config.model
    return load_pipeline(
        root,
        jnp.dtype(model.dtype),
        text=weights and not config.prompts.embeddings,
        t5_length=model.t5_length,
        param_dtype=jnp.dtype(model.param_dtype),
        vae_dtype=jnp.dtype(model.vae_dtype),
        remat=model.remat,
        variant=model.variant,
        transformer=transformer_path(model.transformer, weights=weights),
        sharding=place,
        weights=weights,
    )


def make_judges(config: Config, networks: Networks) -> Judges:
    """Rewards and encoders that the config trains on or evaluates, their networks loaded."""
    share = shares(config.perception)
    spaces = {}
    for name, options in config.encoders.items():
        if name in share or options.evaluate:
            encoder = ENCODERS[name].make(options, networks)
            spaces[name] = Space(encoder.network, encoder.image_features, share.get(name, 0.0))
    return Judges(make_rewards(config.rewards, networks), spaces)


def make_program(config: Config, pipeline: Pipeline, judges: Judges) -> Program:
    """The static half of the train step.

    Raises:
        ConfigError: a sampler that the objective cannot train, or an estimator without bandwidth.
    """
    batch, objective, policy = config.batch, make_objective(config), make_policy(config, pipeline)
    objective.check(policy.sampler)
    at_steps = None
    if config.perception.at == "steps":
        at_steps = tuple(int(step) for step in policy.sampler.trained_steps)
    scorer = Scorer(
        decode=pipeline.decode,
        reward=judges.rewards.trained(),
        spaces={name: judges.spaces[name] for name in shares(config.perception)},
        surprisal=surprisal_function(config.perception, reached_std(policy.sampler)),
        images=batch.decode_images,
        at_steps=at_steps,
    )
    learner = Learner(
        policy=policy,
        objective=objective,
        constraints=make_constraints(config, objective),
        optimizer=make_optimizer(config),
        config=config.updates,
        update_images=batch.update_images,
        average=Average.from_config(config.optimizer),
    )
    drawing = Drawing(
        policy, batch.group_size, batch.rollout_images, objective.needs_paths, at_steps is not None
    )
    return Program(drawing, scorer, learner)


def make_policy(config: Config, pipeline: Pipeline) -> Policy:
    """The pipeline with the rollout's sampler."""
    sampler = config.sampler
    shape = pipeline.latent_shape(config.model.height, config.model.width)
    flow = make_sampler(sampler, pipeline.sigmas(sampler.num_steps, shape))
    return Policy(pipeline.guide, sampler.guidance, config.trainable, flow, shape)


def make_sampler(sampler: SamplerConfig, sigmas: np.ndarray) -> FlowSampler:
    """The rollout's sampler over a schedule [num_steps + 1]."""
    window = (sampler.window[0], sampler.window[1]) if sampler.window else None
    stochastic = stochastic_steps(sampler.num_steps, window, sampler.train_fraction)
    return FlowSampler(
        sigmas=sigmas,
        kernel=sampler.kernel,
        noise_level=sampler.noise_level,
        stochastic=stochastic if sampler.kernel != "ode" else (),
        storage_dtype=jnp.dtype(sampler.storage_dtype),
        noise_everywhere=sampler.noise == "all",
        log_density=sampler.log_density,
        motion=_motion(sampler),
    )


def _motion(sampler: SamplerConfig) -> Motion | None:
    """Over all places from the window to the end of what is trained without one."""
    if sampler.window_moves == "never":
        return None
    end = sum(stochastic_steps(sampler.num_steps, None, sampler.train_fraction))
    places = end - sampler.window[1] + 1
    return Motion(places, sampler.window_moves, sampler.window_iterations)


def reached_std(sampler: FlowSampler) -> Array:
    """The policy's stds at all steps that are ever trained: the noise scale of a whole run."""
    return sampler.step_std(sampler.reached_steps)


def trainable_axes(config: Config, pipeline: Pipeline, params: PyTree) -> PyTree:
    """The logical axes of what learns: a tree like `params`, with a tuple of names per array."""
    axes = logical_axes(pipeline.transformer_boxes())
    kernels = {path[1:]: names for path, names in axes.items() if path[0] == "params"}
    if config.trainable.mode == "full":
        return traverse_util.unflatten_dict(kernels)
    return lora.logical_axes(kernels, params)


def stream_key(config: Config, stream: int) -> Array:
    """The key of one use of randomness, all folded from `config.seed`."""
    return jax.random.fold_in(jax.random.key(config.seed), stream)


def _encode(
    config: Config,
    root: Path,
    prompts: Mapping[str, list[Prompt]],
    readers: tuple[Pipeline, CombinedReward, Networks],
) -> tuple[dict[str, PromptTable], Conditioning]:
    """The tables of several prompt sets and the empty prompt [1, ...], in one go."""
    pipeline, rewards, networks = readers
    every = [prompt for group in prompts.values() for prompt in group]
    texts = [*(prompt.text for prompt in every), encode_prompts.NEGATIVE]
    if config.prompts.embeddings:
        stored = encode_prompts.stored_embeddings(
            config.prompts.embeddings, root, config.model.dtype, config.model.t5_length
        )
        embeddings: Embeddings = stored
        rows = stored.rows(texts)
    else:
        assert pipeline.text is not None  # `load_model` has seen to it
        embeddings, rows = encode_prompts.encode(pipeline.text, texts)
    inputs = rewards.prepare(networks.variables, every)
    tables, start = {}, 0
    for name, group in prompts.items():
        part = slice(start, start + len(group))
        tables[name] = PromptTable(embeddings, rows[part], jax.tree.map(lambda a: a[part], inputs))  # noqa: B023
        start += len(group)
    return tables, embeddings.gather(rows[-1:])
