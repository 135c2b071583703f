"""From a Config to what runs: models loaded, prompts encoded, functions bound.

The only module that knows all the others' constructors. What it returns is data and pure
functions; nothing below it reads a file again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from pec_jax.config.schema import Config, ConfigError, unknown
from pec_jax.data import encode_prompts as embedding
from pec_jax.data.embeddings import Embeddings, PromptTable
from pec_jax.data.prompts import Prompt, load_prompts
from pec_jax.distributed.mesh import Placement
from pec_jax.families.locate import pipeline_directory, prompt_file
from pec_jax.families.pipeline import Pipeline, load_pipeline
from pec_jax.flow import schedule
from pec_jax.flow.transition import KERNELS, schedule_stds
from pec_jax.models import lora
from pec_jax.perception.encoders import Encoder, load_encoder
from pec_jax.perception.entropy import (
    ESTIMATORS,
    get_estimator,
    scale_features,
    schedule_bandwidth,
)
from pec_jax.rewards import base as rewards
from pec_jax.rl.constraints import CONSTRAINTS, check_options, get_constraint
from pec_jax.rl.program import Frozen, Program, constraint_options
from pec_jax.types import Array, Conditioning, PyTree
from pec_jax.weights.convert import logical_axes
from pec_jax.weights.hub import model_directory

ENCODER_REWARDS = ("clip", "pickscore")  # rewards that look through the encoder of their name


@dataclasses.dataclass(frozen=True)
class World:
    """Everything a run, a sample or an evaluation needs."""

    config: Config
    pipeline: Pipeline
    program: Program
    frozen: Frozen
    params: PyTree  # trainable parameters at the start
    param_axes: PyTree  # the logical axes of each of them
    all_rewards: rewards.CombinedReward  # with those of weight 0, for evaluation
    all_reward_encoders: dict[str, str]
    train: PromptTable
    heldout: PromptTable
    heldout_prompts: list[Prompt]
    samples: PromptTable
    sample_prompts: list[Prompt]


def make_world(config: Config, place: Placement | None = None) -> World:
    """Loads and builds everything; a mistake in the config is reported before anything is slow.

    Args:
      config: the run's.
      place: where weights go; None leaves them on the host, or on the default device.

    Raises:
      ConfigError: a name that does not exist, with those that do.
      ValueError: from the loaders: what was wrong in which file.
    """
    check_names(config)
    prompts = {
        "train": list(load_prompts(prompt_file(config.prompts.train))),
        "heldout": list(load_prompts(prompt_file(config.prompts.heldout))),
    }
    if config.eval.num_prompts:
        prompts["heldout"] = prompts["heldout"][: config.eval.num_prompts]
    sampled = [Prompt(text, {}) for text in config.prompts.samples]
    prompts["samples"] = (sampled or prompts["heldout"])[: config.eval.sample_rows]

    root = pipeline_directory(config.model.path, config.model.variant)
    pipeline = load_model(config, root, place)
    encoders = {
        name: load_encoder(
            model_directory(path) if path else root / "encoders" / name,
            jnp.dtype(config.model.encoder_dtype),
            sharding=place,
        )
        for name, path in config.encoders.items()
    }
    make_program(config, pipeline, encoders)  # for its errors, before anything is slow
    tables, negative = _encode(
        config, root, prompts, pipeline, _make_rewards(config.rewards, encoders)[0]
    )
    # Nobody encodes a text any more, and the memory of what does is wanted.
    pipeline = dataclasses.replace(pipeline, text=None)
    encoders = {name: encoder.without_text() for name, encoder in encoders.items()}
    program = make_program(config, pipeline, encoders)
    all_rewards, all_reward_encoders = _make_rewards(config.rewards, encoders)
    frozen = Frozen(
        transformer=pipeline.transformer_variables,
        vae=pipeline.vae_variables,
        negative=negative,
        encoders={name: encoder.params for name, encoder in encoders.items()},
        rewards={n: all_rewards.params[n] for n, e in all_reward_encoders.items() if not e},
    )
    params = trainable_params(config, pipeline.transformer_variables["params"])
    return World(
        config=config,
        pipeline=pipeline,
        program=program,
        frozen=frozen,
        params=params,
        param_axes=trainable_axes(config, pipeline, params),
        all_rewards=all_rewards,
        all_reward_encoders=all_reward_encoders,
        **tables,
        heldout_prompts=prompts["heldout"],
        sample_prompts=prompts["samples"],
    )


def load_model(
    config: Config, root: Path, place: Placement | None, *, weights: bool = True
) -> Pipeline:
    """The pipeline in `root` as the config wants it; see `weights.pipeline.load_pipeline`."""
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
        sharding=place,
        weights=weights,
    )


def _encode(
    config: Config,
    root: Path,
    prompts: Mapping[str, list[Prompt]],
    pipeline: Pipeline,
    reward: rewards.CombinedReward,
) -> tuple[dict[str, PromptTable], Conditioning]:
    """The tables of several prompt sets and the empty prompt [1, ...], in one go."""
    every = [prompt for group in prompts.values() for prompt in group]
    texts = [*(prompt.text for prompt in every), embedding.NEGATIVE]
    if config.prompts.embeddings:
        embeddings: Embeddings = embedding.stored_embeddings(
            config.prompts.embeddings, root, config.model.dtype, config.model.t5_length
        )
        rows = embeddings.rows(texts)
    else:
        embeddings, rows = embedding.encode(pipeline.text, texts)
    inputs = reward.prepare(every)
    tables, start = {}, 0
    for name, group in prompts.items():
        part = slice(start, start + len(group))
        tables[name] = PromptTable(embeddings, rows[part], jax.tree.map(lambda a: a[part], inputs))  # noqa: B023
        start += len(group)
    return tables, embeddings.gather(rows[-1:])


def check_names(config: Config) -> None:
    """Raises ConfigError for a name that does not exist, listing those that do."""
    for field, value, valid in (
        ("sampler.kernel", config.sampler.kernel, KERNELS),
        ("constraint.name", config.constraint.name, CONSTRAINTS),
        ("perception.estimator", config.perception.estimator, ESTIMATORS),
    ):
        if value not in valid:
            raise ConfigError(f"config.{field}: " + unknown("name", value, valid))
    for name in perception_spaces(config):
        if name not in config.encoders:
            raise ConfigError(
                "config.perception.encoder: " + unknown("name", name, config.encoders)
            )
    try:
        check_options(get_constraint(config.constraint.name), constraint_options(config))
    except ValueError as error:
        raise ConfigError(f"config.constraint: {error}") from None
    for name in config.rewards:
        if name not in rewards.REGISTRY:
            raise ConfigError("config.rewards: " + unknown("reward", name, rewards.REGISTRY))


def _make_rewards(
    weights: Mapping[str, float], encoders: dict[str, Encoder]
) -> tuple[rewards.CombinedReward, dict[str, str]]:
    sources = {name: name if name in ENCODER_REWARDS else "" for name in weights}
    for name, encoder in sources.items():
        if encoder and encoder not in encoders:
            raise ConfigError(
                f"config.rewards.{name} needs config.encoders.{encoder}, its model's directory."
            )
    options = {name: {"encoder": encoders[e]} for name, e in sources.items() if e}
    return rewards.combine(weights, options), sources


def make_program(config: Config, pipeline: Pipeline, encoders: dict[str, Encoder]) -> Program:
    """The static half of the train step."""
    reward, reward_encoder = _make_rewards(
        {k: v for k, v in config.rewards.items() if v != 0}, encoders
    )
    sampler = config.sampler
    latent_shape = pipeline.latent_shape(config.model.height, config.model.width)
    sigmas = pipeline.sigmas(sampler.num_steps, latent_shape)
    stochastic = schedule.stochastic_steps(
        sampler.num_steps, sampler.window or None, sampler.train_fraction
    )
    stds = schedule_stds(sigmas, sampler.kernel, sampler.noise_level)
    return Program(
        config=config,
        guide=pipeline.guide,
        decode=pipeline.decode,
        features={name: encoder.image_features for name, encoder in encoders.items()},
        spaces=perception_spaces(config),
        surprisal=surprisal_function(config, stds[np.flatnonzero(stochastic)]),
        reward=reward,
        reward_encoder=reward_encoder,
        constraint=get_constraint(config.constraint.name),
        optimizer=make_optimizer(config),
        sigmas=sigmas,
        stochastic=stochastic,
        latent_shape=latent_shape,
    )


def perception_spaces(config: Config) -> dict[str, float]:
    """Encoder name -> share of the sum, from "dino" or "dino + 0.5 * clip"; the shares sum to 1.

    Raises:
      ConfigError: not such a sum, or a share that is not positive.
    """
    text = config.perception.encoder
    shares: dict[str, float] = {}
    for term in text.split("+"):
        factor, star, name = term.rpartition("*")
        try:
            share = float(factor) if star else 1.0
        except ValueError:
            share = math.nan
        name = name.strip()
        if not name or not 0 < share < math.inf or name in shares:
            raise ConfigError(
                f"config.perception.encoder is {text!r}; give an encoder's name, or a sum of "
                "several with positive factors, such as 'dino + 0.5 * clip'."
            )
        shares[name] = share
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def surprisal_function(config: Config, step_std: Array) -> Callable[[Mapping[str, Array]], Array]:
    """The configured estimator: raw features {encoder: [..., K, d]} -> surprisals [..., K]."""
    spaces = perception_spaces(config)
    estimate = estimator_functions(config, step_std)[config.perception.estimator]

    def surprisal(features: Mapping[str, Array]) -> Array:
        parts = [share * estimate(features[name]) for name, share in spaces.items()]
        return functools.reduce(jnp.add, parts)

    return surprisal


def estimator_functions(config: Config, step_std: Array) -> dict[str, Callable[[Array], Array]]:
    """Every estimator with the config's options: raw features [..., K, d] -> [..., K]."""
    perception = config.perception
    options: dict[str, dict[str, float]] = {
        "gaussian": {"bandwidth": perception.bandwidth or float(schedule_bandwidth(step_std))},
        "logdet": {"eps": perception.eps},
        "knn": {"k": perception.k},
    }

    def bound(name: str) -> Callable[[Array], Array]:
        estimate = functools.partial(get_estimator(name), **options[name])
        return lambda features: estimate(scale_features(features, perception.scale))

    return {name: bound(name) for name in ESTIMATORS}


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, with a linear warm-up."""
    o = config.optimizer
    rate = o.learning_rate
    if o.warmup_steps:
        rate = optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
    adamw = optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return optax.chain(optax.clip_by_global_norm(o.grad_clip), adamw) if o.grad_clip else adamw


def trainable_params(config: Config, params: PyTree) -> PyTree:
    """What learns, as it is before training: a LoRA that does nothing yet, or the weights.

    Args:
      config: the run's.
      params: of the base model's transformer.
    """
    if config.trainable.mode == "full":
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    key = jax.random.fold_in(jax.random.key(config.seed), _LORA_STREAM)
    return lora.init(params, config.trainable.targets, config.trainable.rank, key)


def trainable_axes(config: Config, pipeline: Pipeline, params: PyTree) -> PyTree:
    """The logical axes of what learns: a tree like `params`, with a tuple of names an array."""
    axes = logical_axes(pipeline.transformer_boxes())
    kernels = {path[1:]: names for path, names in axes.items() if path[0] == "params"}
    if config.trainable.mode == "full":
        return traverse_util.unflatten_dict(kernels)
    return lora.logical_axes(kernels, params)


# What the run's key is folded with for each use, so that no two share random numbers.
_LORA_STREAM, TRAIN_STREAM, EVAL_STREAM, BASE_STREAM = range(4)


def stream_key(config: Config, stream: int) -> Array:
    """The key of one use of randomness, all folded from `config.seed`."""
    return jax.random.fold_in(jax.random.key(config.seed), stream)
