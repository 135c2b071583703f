"""From an `ml_collections.ConfigDict` to frozen, validated dataclasses.

Everything below this module takes these dataclasses; nothing else sees a ConfigDict. The
defaults live in `configs/base.py` alone: here every field is required, so that a config file
that forgets one is an error instead of a silent default.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field and what to change."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which pipeline is fine-tuned, and at which image size."""

    path: str  # "shapes" (the embedded default), a diffusers directory, or a hub id @ revision
    variant: str  # of the weights' files, such as fp16; "" is the plain one
    dtype: str  # in which transformer and text encoders compute: float32 | bfloat16
    param_dtype: str  # in which the frozen transformer is kept
    vae_dtype: str  # in which images are decoded
    encoder_dtype: str  # of rewards' and perception's encoders
    t5_length: int  # tokens T5 sees; 0 is diffusers' choice (SD3 256, FLUX 512)
    height: int  # pixels; 0 takes the pipeline's own size
    width: int
    remat: str  # none | full | dots: what of a block the backward pass computes again


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """Which parameters learn."""

    mode: str  # lora | full
    rank: int
    alpha: float
    targets: tuple[str, ...]  # regular expressions over dotted module names


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn (DESIGN: schedule, kernel, window)."""

    num_steps: int
    kernel: str  # flow_sde | dance_sde | cps | ode
    noise_level: float  # a of the kernel; ignored by ode
    guidance: float  # classifier-free guidance scale; 1 is off
    window: tuple[int, ...]  # (start, stop) of the stochastic, trained steps; () is automatic
    train_fraction: float  # automatic window: the first int(train_fraction * num_steps) steps
    storage_dtype: str  # what x_next is rounded to before its log-prob is taken


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """Prompt files (.txt or .jsonl), or names of the embedded sets."""

    train: str
    heldout: str
    embeddings: str  # directory made by `pec_jax.embed`; "" encodes the prompts at the start
    samples: tuple[str, ...]  # prompts of the sample grids; () takes the first held-out ones


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sizes of one iteration, and of the pieces it is computed in, which bound memory."""

    groups: int  # P, prompts an iteration, over all hosts
    group_size: int  # K, images a prompt
    rollout_images: int  # images of every group that are sampled at once; 0 is all
    decode_images: int  # of every group, decoded and scored at once; 0 is all
    update_images: int  # of every group, in one forward/backward pass; 0 is a whole mini-batch


@dataclasses.dataclass(frozen=True)
class PerceptionConfig:
    """The feature space and the estimator of the perceptual entropy."""

    encoder: str  # a name in `encoders`, or a sum such as "dino + 0.5 * clip"
    estimator: str  # gaussian | logdet | knn
    scale: str  # unit | unit_sqrt_d
    bandwidth: float  # gaussian: s; 0 takes the rms of the policy's own std ("schedule")
    eps: float  # logdet: ridge
    k: int  # knn: which neighbour
    at: str  # final: the finished image | steps: each trained step's prediction of it


@dataclasses.dataclass(frozen=True)
class ConstraintConfig:
    """The diversity constraint, its weight, and what single methods have besides."""

    name: str  # a key of grpo.constraints.CONSTRAINTS
    space: str  # perceptual | latent: where surprise is measured
    weight: float  # lambda; of kl and kl_cov their beta; of pec_target where lambda starts
    unit: str  # raw | reward_std: what the weight is counted in
    clip_ratio: float  # clip_higher: e_high is this times grpo.clip_high
    cov_band: tuple[float, ...]  # clip_cov: quantiles between which losses are dropped
    cov_share: float  # clip_cov: share of the band dropped; kl_cov: share of all penalised
    kl_as: str  # reward | loss: how pcvae's divergence enters
    gradient: str  # score | exact: of entropy_reg
    target: float  # pec_target: exp(H*) as a share of the base model's exp(H_perc)
    rate: float  # pec_target: change of lambda per nat and iteration
    base_batches: int  # pec_target: batches of prompts over which the base model is measured


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """The policy update."""

    clip_low: float
    clip_high: float
    advantage_std: str  # group | global
    advantage_clip: float
    kl_form: str  # exact | flow_grpo
    minibatches: int  # optimizer updates in one pass over a rollout
    epochs: int  # passes over a rollout


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, gradient clipping and an EMA of the parameters."""

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    b1: float
    b2: float
    eps: float
    grad_clip: float  # global norm; 0 is off
    ema_decay: float
    max_skipped: int  # non-finite updates in a row after which the run stops


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation and sample grids."""

    num_prompts: int  # held-out prompts used; 0 is all
    images_per_prompt: int
    groups: int  # prompts evaluated at once
    num_steps: int  # ODE steps
    guidance: float
    use_ema: bool
    entropy_probes: int  # of the output entropy's divergence, a step; 0 leaves it out
    sample_rows: int
    sample_columns: int


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How often the host does what, in iterations; 0 is never (the end always counts)."""

    log_every: int
    sample_every: int
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh, see `sharding`; one axis may be -1, which takes what is left."""

    data: int  # splits the groups
    fsdp: int  # splits the groups, and parameters where they are stored
    tensor: int  # splits layers
    rules: Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int
    num_iterations: int
    model: ModelConfig
    trainable: TrainableConfig
    sampler: SamplerConfig
    prompts: PromptsConfig
    batch: BatchConfig
    rewards: Mapping[str, float]  # name -> weight; 0 is measured in evaluation only
    encoders: Mapping[str, str]  # name -> directory; "" is the pipeline's own encoders/<name>
    perception: PerceptionConfig
    constraint: ConstraintConfig
    grpo: GrpoConfig
    optimizer: OptimizerConfig
    eval: EvalConfig
    schedule: ScheduleConfig
    mesh: MeshConfig


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """The sentence for a name that does not exist: what was given, what exists, what is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Valid: {', '.join(names)}."


def from_config_dict(config: Mapping[str, Any]) -> Config:
    """Builds and validates a Config from a ConfigDict or nested dict.

    Raises:
      ConfigError: on an unknown or missing field, a wrong type or a value out of range.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    result = _build(Config, config, "config")
    _validate(result)
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """A nested dict of plain values, as stored in `config.json`."""
    return _plain(config)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each field in which two `to_dict` results differ."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    lines = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(key, "(absent)"), flat_new.get(key, "(absent)")
        if before != after:
            lines.append(f"config.{key}: {before!r} there, {after!r} now")
    return lines


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a section with fields, not {values!r}.")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{where}: " + unknown("field", key, hints))
    missing = [name for name in hints if name not in values]
    if missing:
        raise ConfigError(
            f"{where} lacks {', '.join(missing)}. Start from configs/base.py, which sets them all."
        )
    return cls(**{k: _convert(hints[k], values[k], f"{where}.{k}") for k in hints})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a tuple, not {value!r}.")
        return tuple(_convert(item, v, where) for v in value)
    if origin is not None:  # Mapping[str, T]
        item = typing.get_args(hint)[1]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section with fields, not {value!r}.")
        return types.MappingProxyType(
            {str(k): _convert(item, v, f"{where}.{k}") for k, v in value.items()}
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} must be of type {hint.__name__}, not {value!r}.")
    return value


_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.vae_dtype": ("float32", "bfloat16"),
    "model.encoder_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "trainable.mode": ("lora", "full"),
    "sampler.storage_dtype": ("float32", "bfloat16"),
    "perception.scale": ("unit", "unit_sqrt_d"),
    "perception.at": ("final", "steps"),
    "constraint.space": ("perceptual", "latent"),
    "constraint.kl_as": ("reward", "loss"),
    "constraint.gradient": ("score", "exact"),
    "constraint.unit": ("raw", "reward_std"),
    "grpo.advantage_std": ("group", "global"),
    "grpo.kl_form": ("exact", "flow_grpo"),
}

# field -> (lowest allowed, highest allowed or None)
_RANGES = {
    "num_iterations": (0, None),
    "model.t5_length": (0, 512),
    "model.height": (0, 8192),
    "model.width": (0, 8192),
    "trainable.rank": (1, 4096),
    "sampler.num_steps": (2, 1000),
    "sampler.noise_level": (0.0, 10.0),
    "sampler.guidance": (0.0, 100.0),
    "sampler.train_fraction": (0.0, 1.0),
    "batch.groups": (1, None),
    "batch.group_size": (2, None),
    "batch.rollout_images": (0, None),
    "batch.decode_images": (0, None),
    "batch.update_images": (0, None),
    "perception.bandwidth": (0.0, None),
    "perception.eps": (0.0, None),
    "perception.k": (1, None),
    "constraint.weight": (0.0, None),
    "constraint.clip_ratio": (1.0, None),
    "constraint.cov_share": (0.0, 1.0),
    "constraint.target": (0.01, 100.0),
    "constraint.rate": (0.0, None),
    "constraint.base_batches": (1, None),
    "grpo.clip_low": (0.0, 1.0),
    "grpo.clip_high": (0.0, None),
    "grpo.advantage_clip": (0.0, None),
    "grpo.minibatches": (1, None),
    "grpo.epochs": (1, None),
    "optimizer.learning_rate": (0.0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.weight_decay": (0.0, None),
    "optimizer.b1": (0.0, 1.0),
    "optimizer.b2": (0.0, 1.0),
    "optimizer.eps": (0.0, None),
    "optimizer.grad_clip": (0.0, None),
    "optimizer.ema_decay": (0.0, 1.0),
    "optimizer.max_skipped": (1, None),
    "eval.num_prompts": (0, None),
    "eval.images_per_prompt": (2, None),
    "eval.groups": (1, None),
    "eval.num_steps": (2, 1000),
    "eval.guidance": (0.0, 100.0),
    "eval.entropy_probes": (0, 1000),
    "eval.sample_rows": (1, 64),
    "eval.sample_columns": (1, 64),
    "schedule.log_every": (1, None),
    "schedule.sample_every": (0, None),
    "schedule.eval_every": (0, None),
    "schedule.checkpoint_every": (0, None),
    "schedule.keep_checkpoints": (1, None),
}


def _validate(config: Config) -> None:
    flat = _flatten(to_dict(config))
    for field, choices in _CHOICES.items():
        if flat[field] not in choices:
            raise ConfigError(f"config.{field}: " + unknown("value", flat[field], choices))
    for field, (low, high) in _RANGES.items():
        value = flat[field]
        if not (value >= low and (high is None or value <= high)):  # also refuses NaN
            bounds = f"at least {low}" + ("" if high is None else f" and at most {high}")
            hint = " A group needs two images to be compared." * (field == "batch.group_size")
            raise ConfigError(f"config.{field} is {value}; it must be {bounds}.{hint}")
    _validate_division(config)
    _validate_window(config.sampler)
    _validate_mesh(config.mesh)
    band = config.constraint.cov_band
    if len(band) != 2 or not 0 <= band[0] < band[1] <= 1:
        raise ConfigError(
            f"config.constraint.cov_band is {band}; it must be two rising quantiles in [0, 1], "
            "such as (0.8, 1.0)."
        )
    p = config.perception
    if p.estimator == "knn" and p.k >= config.batch.group_size:
        raise ConfigError(
            f"config.perception.k is {p.k}, but an image has only {config.batch.group_size - 1} "
            "neighbours in its group: take a smaller k or a larger config.batch.group_size."
        )
    for field, limit in (("sample_rows", "groups"), ("sample_columns", "images_per_prompt")):
        if getattr(config.eval, field) > getattr(config.eval, limit):
            raise ConfigError(
                f"config.eval.{field} is {getattr(config.eval, field)}, more than config.eval."
                f"{limit} ({getattr(config.eval, limit)}), which are drawn at once: lower it."
            )
    if not any(weight != 0 for weight in config.rewards.values()):
        raise ConfigError("config.rewards: at least one reward needs a weight other than 0.")


def _validate_division(config: Config) -> None:
    size, parts = config.batch.group_size, config.grpo.minibatches
    if size % parts:
        raise ConfigError(
            f"config.batch.group_size ({size}) does not divide into config.grpo.minibatches "
            f"({parts}), each of which takes as many images of every group: choose a multiple of "
            f"{parts}."
        )
    for name, images, total in (
        ("rollout_images", config.batch.rollout_images, size),
        ("decode_images", config.batch.decode_images, size),
        ("update_images", config.batch.update_images, size // parts),
    ):
        if images and total % images:
            raise ConfigError(
                f"config.batch.{name} is {images}, which does not divide the {total} images of "
                f"a group{' in a mini-batch' * (total < size)}: take a divisor, or 0 for all."
            )


def _validate_window(sampler: SamplerConfig) -> None:
    if not sampler.window:
        return
    if len(sampler.window) != 2:
        raise ConfigError("config.sampler.window must be (start, stop), or () for automatic.")
    start, stop = sampler.window
    if not 0 <= start < stop <= sampler.num_steps:
        raise ConfigError(
            f"config.sampler.window is {sampler.window}; it must satisfy "
            f"0 <= start < stop <= num_steps ({sampler.num_steps})."
        )


def _validate_mesh(mesh: MeshConfig) -> None:
    axes = ("data", "fsdp", "tensor")
    for axis in axes:
        size = getattr(mesh, axis)
        if size < 1 and size != -1:
            raise ConfigError(
                f"config.mesh.{axis} is {size}; it must be at least 1, or -1 for what is left."
            )
    for name, targets in mesh.rules.items():
        for target in targets:
            if target not in axes:
                raise ConfigError(f"config.mesh.rules.{name}: " + unknown("axis", target, axes))
