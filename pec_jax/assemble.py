"""From a Config to what runs: models loaded, prompts encoded, functions bound.

The only module that knows all the others' constructors. What it returns is data and pure
functions; nothing below it reads a file again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pec_jax.config import Config, ConfigError, unknown
from pec_jax.data.embeddings import PromptTable
from pec_jax.data.prompts import Prompt, load_prompts
from pec_jax.flow import schedule
from pec_jax.flow.sampler import VelocityFn
from pec_jax.flow.transition import KERNELS, schedule_stds
from pec_jax.grpo.constraints import CONSTRAINTS, get_constraint
from pec_jax.models import lora, vae
from pec_jax.perception.encoders import Encoder, load_encoder
from pec_jax.perception.entropy import (
    ESTIMATORS,
    get_estimator,
    scale_features,
    schedule_bandwidth,
)
from pec_jax.program import Frozen, Program
from pec_jax.rewards import base as rewards
from pec_jax.types import Array, Conditioning, PyTree
from pec_jax.weights.pipeline import Pipeline, load_pipeline

SHAPES_DIRECTORY = Path(__file__).parent / "assets" / "shapes"
ENCODER_REWARDS = ("clip", "pickscore")  # rewards that look through the encoder of their name


@dataclasses.dataclass(frozen=True)
class World:
    """Everything a run, a sample or an evaluation needs."""

    config: Config
    pipeline: Pipeline
    program: Program
    frozen: Frozen
    params: PyTree  # trainable parameters at the start
    all_rewards: rewards.CombinedReward  # with those of weight 0, for evaluation
    all_reward_encoders: dict[str, str]
    train: PromptTable
    heldout: PromptTable
    heldout_prompts: list[Prompt]
    samples: PromptTable
    sample_prompts: list[Prompt]


def model_directory(path: str) -> Path:
    """`shapes` is the embedded pipeline; anything else is a directory."""
    return SHAPES_DIRECTORY if path == "shapes" else Path(path).expanduser()


def prompt_file(name: str) -> Path:
    """`shapes/<set>` is an embedded prompt set unless such a file exists; else a file's path."""
    embedded = SHAPES_DIRECTORY / "prompts" / f"{name.removeprefix('shapes/')}.txt"
    if name.startswith("shapes/") and not Path(name).exists():
        if not embedded.is_file():
            raise ConfigError(
                "config.prompts: "
                + unknown(
                    "prompt set", name, [f"shapes/{p.stem}" for p in embedded.parent.iterdir()]
                )
            )
        return embedded
    return Path(name).expanduser()


def make_world(config: Config) -> World:
    """Loads and builds everything; a mistake in the config is reported before anything is slow.

    Raises:
      ConfigError: a name that does not exist, with those that do.
      ValueError: from the loaders: what was wrong in which file.
    """
    _check_names(config)
    prompts = {
        "train": list(load_prompts(prompt_file(config.prompts.train))),
        "heldout": list(load_prompts(prompt_file(config.prompts.heldout))),
    }
    if config.eval.num_prompts:
        prompts["heldout"] = prompts["heldout"][: config.eval.num_prompts]
    sampled = [Prompt(text, {}) for text in config.prompts.samples]
    prompts["samples"] = (sampled or prompts["heldout"])[: config.eval.sample_rows]

    root = model_directory(config.model.path)
    pipeline = load_pipeline(root, jnp.dtype(config.model.dtype), remat=config.model.remat)
    encoders = {
        name: load_encoder(path or root / "encoders" / name)
        for name, path in config.encoders.items()
    }
    reward, reward_encoder = _make_rewards(
        {k: v for k, v in config.rewards.items() if v != 0}, encoders
    )
    all_rewards, all_reward_encoders = _make_rewards(config.rewards, encoders)
    program = _make_program(config, pipeline, encoders, reward, reward_encoder)
    tables, negative = _encode(prompts, pipeline, all_rewards)
    frozen = Frozen(
        transformer=pipeline.transformer_variables,
        vae=pipeline.vae_variables,
        negative=negative,
        encoders={name: encoder.params for name, encoder in encoders.items()},
        rewards={n: all_rewards.params[n] for n, e in all_reward_encoders.items() if not e},
    )
    return World(
        config=config,
        pipeline=pipeline,
        program=program,
        frozen=frozen,
        params=trainable_params(config, pipeline),
        all_rewards=all_rewards,
        all_reward_encoders=all_reward_encoders,
        **tables,
        heldout_prompts=prompts["heldout"],
        sample_prompts=prompts["samples"],
    )


def _encode(
    prompts: Mapping[str, list[Prompt]], pipeline: Pipeline, reward: rewards.CombinedReward
) -> tuple[dict[str, PromptTable], Conditioning]:
    """The tables of several prompt sets and the empty prompt, in one go: towers compile once."""
    every = [prompt for group in prompts.values() for prompt in group]
    conditioning = pipeline.text.encode([*(p.text for p in every), ""])
    inputs = reward.prepare(every)
    tables, start = {}, 0
    for name, group in prompts.items():
        rows = slice(start, start + len(group))
        tables[name] = PromptTable(*jax.tree.map(lambda a: a[rows], (conditioning, inputs)))  # noqa: B023
        start += len(group)
    return tables, jax.tree.map(lambda a: a[-1:], conditioning)


def _check_names(config: Config) -> None:
    for field, value, valid in (
        ("sampler.kernel", config.sampler.kernel, KERNELS),
        ("constraint.name", config.constraint.name, CONSTRAINTS),
        ("perception.estimator", config.perception.estimator, ESTIMATORS),
        ("perception.encoder", config.perception.encoder, config.encoders),
    ):
        if value not in valid:
            raise ConfigError(f"config.{field}: " + unknown("name", value, valid))
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


def _make_program(
    config: Config,
    pipeline: Pipeline,
    encoders: dict[str, Encoder],
    reward: rewards.CombinedReward,
    reward_encoder: dict[str, str],
) -> Program:
    sampler = config.sampler
    latent_shape = latent_size(pipeline, config.model.height, config.model.width)
    num_tokens = latent_shape[0] * latent_shape[1] // pipeline.transformer.config.patch_size**2
    sigmas = schedule.from_scheduler_config(pipeline.scheduler, sampler.num_steps, num_tokens)
    stochastic = schedule.stochastic_steps(
        sampler.num_steps, sampler.window or None, sampler.train_fraction
    )
    stds = schedule_stds(sigmas, sampler.kernel, sampler.noise_level)
    return Program(
        config=config,
        velocity_fn=velocity_function(pipeline),
        decode=decode_function(pipeline),
        features={name: encoder.image_features for name, encoder in encoders.items()},
        surprisal=surprisal_function(config, stds[np.flatnonzero(stochastic)]),
        reward=reward,
        reward_encoder=reward_encoder,
        constraint=get_constraint(config.constraint.name),
        optimizer=make_optimizer(config),
        sigmas=sigmas,
        stochastic=stochastic,
        latent_shape=latent_shape,
    )


def velocity_function(pipeline: Pipeline) -> VelocityFn:
    """The transformer as v(variables, x_t [N, h, w, C], sigma, conditioning) -> [N, h, w, C]."""
    module = pipeline.transformer

    def velocity(variables: PyTree, x_t: Array, sigma: Array, conditioning: Conditioning) -> Array:
        timestep = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32) * 1000.0, x_t.shape[:1])
        return module.apply(variables, x_t, timestep, conditioning.tokens, conditioning.pooled)

    return velocity


def decode_function(pipeline: Pipeline) -> Callable[[PyTree, Array], Array]:
    """The decoder as (variables, latents [N, h, w, C]) -> images [N, H, W, 3] in [0, 1]."""

    def decode(variables: PyTree, latents: Array) -> Array:
        latents = vae.unscale_latents(pipeline.vae.config, latents)
        images = pipeline.vae.apply(variables, latents, method="decode")
        return jnp.clip(images.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)

    return decode


def surprisal_function(config: Config, step_std: Array) -> Callable[[Array], Array]:
    """The configured estimator: raw features [P, K, d] -> surprisals [P, K]."""
    perception = config.perception
    options = {
        "gaussian": {"bandwidth": perception.bandwidth or float(schedule_bandwidth(step_std))},
        "logdet": {"eps": perception.eps},
        "knn": {"k": perception.k},
    }
    estimate = functools.partial(
        get_estimator(perception.estimator), **options[perception.estimator]
    )
    return lambda features: estimate(scale_features(features, perception.scale))


def latent_size(pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
    """(h, w, C) of the latents of an image; 0 takes the pipeline's own size.

    Raises:
      ConfigError: if the size is not a whole number of patches.
    """
    height, width = height or pipeline.default_size, width or pipeline.default_size
    unit = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    for name, size in (("height", height), ("width", width)):
        if size % unit:
            near = max(unit, round(size / unit) * unit)
            raise ConfigError(
                f"{name} is {size} pixels; this model takes multiples of {unit}, such as {near}."
            )
    factor = pipeline.vae_scale_factor
    return height // factor, width // factor, pipeline.latent_channels


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, with a linear warm-up."""
    o = config.optimizer
    rate = o.learning_rate
    if o.warmup_steps:
        rate = optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
    adamw = optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return optax.chain(optax.clip_by_global_norm(o.grad_clip), adamw) if o.grad_clip else adamw


def trainable_params(config: Config, pipeline: Pipeline) -> PyTree:
    """What learns, as it is before training: a LoRA that does nothing yet, or the weights."""
    params = pipeline.transformer_variables["params"]
    if config.trainable.mode == "full":
        return jax.tree.map(lambda a: np.array(a, np.float32), params)
    key = jax.random.fold_in(jax.random.key(config.seed), _LORA_STREAM)
    return lora.init(params, config.trainable.targets, config.trainable.rank, key)


# What the run's key is folded with for each use, so that no two share random numbers.
_LORA_STREAM, TRAIN_STREAM, EVAL_STREAM = range(3)


def stream_key(config: Config, stream: int) -> Array:
    """The key of one use of randomness, all folded from `config.seed`."""
    return jax.random.fold_in(jax.random.key(config.seed), stream)
