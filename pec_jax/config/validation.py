"""What single fields cannot tell: fields that contradict each other."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pec_jax.config.errors import ConfigError, unknown
from pec_jax.config.schema import Config, MeshConfig, SamplerConfig


def validate(config: Config) -> None:
    """Raises ConfigError for fields that contradict each other."""
    _check_division(config)
    _check_window(config.sampler)
    _check_mesh(config.mesh)
    _check_targets(config.trainable.targets)
    p = config.perception
    if p.at == "steps" and config.sampler.window_moves != "never":
        raise ConfigError(
            f"config.sampler.window_moves is {config.sampler.window_moves!r} and "
            "config.perception.at is 'steps': the entropy would change with the window and not "
            "with the policy. Take config.perception.at=final."
        )
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
    if not any(reward.weight != 0 for reward in config.rewards.values()):
        raise ConfigError("config.rewards: at least one reward needs a weight other than 0.")


def _check_division(config: Config) -> None:
    size, parts = config.batch.group_size, config.updates.minibatches
    if size % parts:
        raise ConfigError(
            f"config.batch.group_size ({size}) does not divide into config.updates.minibatches "
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


def _check_window(sampler: SamplerConfig) -> None:
    if sampler.kernel == "cps" and sampler.noise_level > 1:
        raise ConfigError(
            f"config.sampler.noise_level is {sampler.noise_level}; of the kernel cps it is the "
            "share of the noise that is fresh: at most 1."
        )
    if sampler.window_moves != "never":
        _check_motion(sampler)
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


def _check_motion(sampler: SamplerConfig) -> None:
    moves = f"config.sampler.window_moves is {sampler.window_moves!r}"
    if not sampler.window:
        raise ConfigError(f"{moves}: give the window, such as config.sampler.window=(0,2).")
    if sampler.kernel == "ode":
        raise ConfigError(f"{moves}, but the kernel ode has no stochastic steps: take another.")
    end = int(sampler.train_fraction * sampler.num_steps)
    if sampler.window[-1] >= end:
        raise ConfigError(
            f"{moves}, but the window {sampler.window} already ends where it could go, at "
            f"int(train_fraction * num_steps) = {end}: begin earlier, or take a shorter one."
        )


def _check_targets(targets: Sequence[str]) -> None:
    for target in targets:
        try:
            re.compile(target)
        except re.error as error:
            raise ConfigError(
                f"config.trainable.targets: {target!r} is not a regular expression: {error}."
            ) from None


def _check_mesh(mesh: MeshConfig) -> None:
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
