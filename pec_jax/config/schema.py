"""The sections of a run's config, frozen and validated.

Everything below this package takes these dataclasses; nothing else sees a ConfigDict. The values
live in `configs/base.py` alone: here every field is required, so that a config file that forgets
one is an error instead of a silent default. Fields that are newer than run directories which lack
them have the default that means what was done before. Sections that a definition brings along
(constraints, objectives, rewards, encoders) have theirs there, see `registry`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pec_jax.config import fields
from pec_jax.config.errors import ConfigError
from pec_jax.config.fields import field
from pec_jax.config.registry import CONSTRAINTS, ENCODERS, OBJECTIVES, REWARDS, Choice, Registry

FLOATS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which pipeline is fine-tuned, and at which image size."""

    path: str = field("`shapes` (the embedded one), a diffusers directory, or a hub id@revision.")
    variant: str = field("Variant of the weight files, such as fp16; '' is the plain one.")
    dtype: str = field("Compute type of transformer and text encoders.", choices=FLOATS)
    param_dtype: str = field("Type the frozen transformer is kept in.", choices=FLOATS)
    vae_dtype: str = field("Compute type of the decoder.", choices=FLOATS)
    encoder_dtype: str = field("Type of the encoders of rewards and perception.", choices=FLOATS)
    encoder_resize: str = field(
        "How images are resized for encoders: as Pillow does 8-bit ones, or without rounding.",
        choices=("pil", "float"),
    )
    t5_length: int = field("Tokens T5 sees; 0 is diffusers' choice.", low=0, high=512)
    height: int = field("Pixels; 0 is the pipeline's own size.", low=0, high=8192)
    width: int = field("Pixels; 0 is the pipeline's own size.", low=0, high=8192)
    remat: str = field(
        "What of a block the backward pass recomputes: all but what the name says it keeps.",
        choices=("none", "full", "dots", "attention"),
    )
    transformer: str = field(
        "Transformer in place of the pipeline's: a file of weights as its publisher or diffusers "
        "has it, a directory, or a hub id@revision; '' is the pipeline's own.",
        "",
    )


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """Which parameters learn."""

    mode: str = field("A LoRA, or all weights of the transformer.", choices=("lora", "full"))
    rank: int = field("Of the LoRA.", low=1, high=4096)
    alpha: float = field("Of the LoRA; its scale is alpha / rank.")
    targets: tuple[str, ...] = field("Regular expressions over dotted module names.")
    init: str = field("LoRA file, run directory or hub id@revision to start from; '' is none.", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How images are drawn in a rollout: schedule, kernel, window."""

    num_steps: int = field("Sampler steps T.", low=2, high=1000)
    kernel: str = field(
        "Transition kernel of the stochastic steps.",
        choices=("flow_sde", "dance_sde", "cps", "ode"),
    )
    noise_level: float = field("Noise level a of the kernel; ode ignores it.", low=0.0, high=10.0)
    guidance: float = field("Guidance scale in rollout and loss; 1 is off.", low=0.0, high=100.0)
    window: tuple[int, ...] = field("(start, stop) of the stochastic, trained steps; () is auto.")
    train_fraction: float = field(
        "Automatic window: the first int(train_fraction * num_steps) steps.", low=0.0, high=1.0
    )
    window_moves: str = field(
        "Whether the window stays, goes on by a step and around (MixGRPO), or jumps.",
        "never",
        choices=("never", "forward", "at_random"),
    )
    window_iterations: int = field("Iterations before a window moves.", 1, low=1)
    noise: str = field(
        "Which steps draw noise: the trained ones, or all of them.", choices=("trained", "all")
    )
    log_density: str = field(
        "Of a step: the Gaussian's, or -|x_next - mean|^2, as Flow-GRPO has it for cps.",
        choices=("gaussian", "squared_error"),
    )
    storage_dtype: str = field("x_next is rounded to it before its log-prob.", choices=FLOATS)


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """Prompt files (.txt or .jsonl), directories of such files, or names of the embedded sets."""

    train: str = field("Prompts to train on.")
    heldout: str = field("Prompts to evaluate on.")
    embeddings: str = field("Directory made by `pec_jax.embed`; '' encodes at the start.")
    samples: tuple[str, ...] = field("Prompts of the sample grids; () is the first held-out ones.")


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sizes of one iteration, and of the pieces it is computed in, which bound memory."""

    groups: int = field("P, prompts per iteration, over all processes.", low=1)
    group_size: int = field("K, images per prompt; a group needs two to be compared.", low=2)
    rollout_images: int = field("Images of every group sampled at once; 0 is all.", low=0)
    decode_images: int = field("Images of every group decoded at once; 0 is all.", low=0)
    update_images: int = field("Images of every group per backward pass; 0 is all.", low=0)


@dataclasses.dataclass(frozen=True)
class PerceptionConfig:
    """The feature space and the estimator of the perceptual entropy."""

    encoder: str = field("An encoder's name, or a sum such as 'dino + 0.5 * clip'.")
    estimator: str = field(
        "Estimator of the perceptual entropy.", choices=("gaussian", "logdet", "knn")
    )
    scale: str = field("Norm of the features, 1 or sqrt(d).", choices=("unit", "unit_sqrt_d"))
    bandwidth: float = field("gaussian: s; 0 is the rms of the policy's own std.", low=0.0)
    eps: float = field("logdet: ridge; at least 1e-6 of a group's total variance.", low=0.0)
    k: int = field("knn: which neighbour.", low=1)
    at: str = field(
        "The final image, or each trained step's prediction.", choices=("final", "steps")
    )


@dataclasses.dataclass(frozen=True)
class UpdatesConfig:
    """From a rollout to the updates of the parameters, whatever the objective."""

    minibatches: int = field("Optimizer updates in one pass over a rollout.", low=1)
    epochs: int = field("Passes over a rollout.", low=1)
    advantage_std: str = field(
        "Advantages are scaled by the std of each group, or of all.", choices=("group", "global")
    )
    advantage_clip: float = field("Bound on the absolute advantage.", low=0.0)
    drop_zero_advantages: bool = field(
        "Images of advantage 0 (a group of equal rewards) leave the means of the loss."
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, gradient clipping and an EMA of the parameters."""

    learning_rate: float = field("Of AdamW, after the warm-up.", low=0.0)
    warmup_steps: int = field("Updates over which it rises from 0.", low=0)
    weight_decay: float = field("Of AdamW.", low=0.0)
    b1: float = field("Of AdamW.", low=0.0, high=1.0)
    b2: float = field("Of AdamW.", low=0.0, high=1.0)
    eps: float = field("Of AdamW.", low=0.0)
    grad_clip: float = field("Bound on the gradient's global norm; 0 is off.", low=0.0)
    ema_decay: float = field("Of the averaged parameters, each time they move.", low=0.0, high=1.0)
    ema_every: int = field("Updates from one of their moves to the next.", low=1)
    ema_repeats: int = field("Moves at a time, one after the other.", low=1)
    ema_warmup: bool = field("The decay is at most (1 + n) / (10 + n) after n updates.")
    max_skipped: int = field("Non-finite updates in a row after which a run stops.", low=1)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation and sample grids."""

    num_prompts: int = field("Held-out prompts used; 0 is all.", low=0)
    images_per_prompt: int = field("Images drawn per prompt.", low=2)
    groups: int = field("Prompts evaluated at once.", low=1)
    num_steps: int = field("ODE steps.", low=2, high=1000)
    guidance: float = field("Guidance scale; 1 is off.", low=0.0, high=100.0)
    use_ema: bool = field("Evaluate the averaged parameters.")
    entropy_probes: int = field("Per step, of the output entropy; 0 is off.", low=0, high=1000)
    sample_rows: int = field("Prompts of a sample grid.", low=1, high=64)
    sample_columns: int = field("Images per prompt of a sample grid.", low=1, high=64)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How often the host does what, in iterations; 0 is never (the end always counts)."""

    log_every: int = field("Metrics are written.", low=1)
    sample_every: int = field("Sample grids are drawn.", low=0)
    eval_every: int = field("The held-out evaluation runs.", low=0)
    checkpoint_every: int = field("A checkpoint is saved.", low=0)
    keep_checkpoints: int = field("Newest checkpoints kept.", low=1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh, see `distributed.mesh`; one axis may be -1, which takes what is left."""

    data: int = field("Splits the groups.")
    fsdp: int = field("Splits the groups, and parameters where they are stored.")
    tensor: int = field("Splits layers.")
    rules: Mapping[str, tuple[str, ...]] = field("Logical axis -> mesh axes.")


def _sections(registry: Registry, help: str) -> Any:
    return dataclasses.field(metadata={"help": help, "registry": registry})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = field("Governs everything random.", low=0, high=2**32 - 1)
    num_iterations: int = field("Rollouts, each followed by its updates.", low=0)
    objective: Choice = dataclasses.field(
        metadata={"help": "Name of the objective, and the options of each.", "choice": OBJECTIVES}
    )
    model: ModelConfig
    trainable: TrainableConfig
    sampler: SamplerConfig
    prompts: PromptsConfig
    batch: BatchConfig
    rewards: Mapping[str, Any] = _sections(REWARDS, "Rewards, by name.")
    encoders: Mapping[str, Any] = _sections(ENCODERS, "Perceptual encoders, by name.")
    perception: PerceptionConfig
    constraints: Mapping[str, Any] = _sections(CONSTRAINTS, "Constraints, by name.")
    updates: UpdatesConfig
    optimizer: OptimizerConfig
    eval: EvalConfig
    schedule: ScheduleConfig
    mesh: MeshConfig


# Sections of earlier versions, and where their fields are now.
_MOVED = {
    "constraint": "constraints combine now: config.constraints.NAME.weight and the like",
    "grpo": "see config.objective, config.updates and config.constraints.kl.form",
}


def from_config_dict(config: Mapping[str, Any] | ConfigDict) -> Config:
    """Builds and validates a Config from a ConfigDict or nested dict.

    Raises:
        ConfigError: on an unknown or missing field, a wrong type, a value out of range, or fields
            that contradict each other.
    """
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    for section, now in _MOVED.items():
        if isinstance(config, Mapping) and section in config:
            raise ConfigError(f"config.{section} is of an earlier version of pec_jax: {now}.")
    from pec_jax.config.validation import validate  # which takes a Config

    result = fields.build(Config, config, "config")
    validate(result)
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """A nested dict of plain values, as stored in `config.json`."""
    return fields.plain(config)
