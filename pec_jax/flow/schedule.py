"""Noise schedules: which sigmas a sampler visits.

A schedule is a decreasing array sigmas [T + 1] from 1 (noise) to 0 (image); step t goes from
sigmas[t] to sigmas[t + 1]. Schedules are computed on the host in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Options of diffusers' scheduler_config.json that change the sigmas or the step and that we do
# not follow, with the value at which they have no effect.
_INERT_OPTIONS: dict[str, Any] = {
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
_SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"


def sd3_sigmas(num_steps: int, shift: float = 3.0, num_train_timesteps: int = 1000) -> np.ndarray:
    """The schedule of Stable Diffusion 3.

    sigma' = s sigma / (1 + (s - 1) sigma), applied to evenly spaced sigma between 1 and the
    smallest training sigma. That smallest one has itself been shifted already, as in diffusers.

    Args:
        num_steps: T, at least 1.
        shift: s > 0; 1 leaves the spacing even.
        num_train_timesteps: how many discrete times the model was trained on.

    Returns:
        [T + 1] float32 from 1 down to 0.

    Raises:
        ValueError: for num_steps below 1 or a shift that is not positive.

    Source: Esser et al. 2024 (arXiv 2403.03206), eq. 23; diffusers' Euler scheduler.
    """
    _check_num_steps(num_steps)
    if not shift > 0:
        raise ValueError(f"shift is {shift}: it must be positive (SD3 uses 3.0).")
    sigma_min = _shift(1.0 / num_train_timesteps, shift)
    return _finish(_shift(np.linspace(1.0, sigma_min, num_steps), shift))


def flux_sigmas(
    num_steps: int,
    num_tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> np.ndarray:
    """The schedule of FLUX.1, which spends more steps on noise the larger the image.

    sigma' = e^mu / (e^mu + 1 / sigma - 1), applied to sigma = 1, (T - 1) / T, ..., 1 / T, with
    mu linear in the number of image tokens: base_shift at base_tokens, max_shift at max_tokens.

    Args:
        num_steps: T, at least 1.
        num_tokens: image tokens the transformer sees, (height / 16) (width / 16).
        base_shift: mu at base_tokens.
        max_shift: mu at max_tokens.
        base_tokens: tokens of the smallest trained image.
        max_tokens: tokens of the largest.

    Returns:
        [T + 1] float32 from 1 down to 0.

    Raises:
        ValueError: for num_steps or num_tokens below 1.

    Source: FLUX.1 reference sampler; diffusers' FluxPipeline.
    """
    _check_num_steps(num_steps)
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}: an image has at least one token.")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = base_shift + slope * (num_tokens - base_tokens)
    sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
    return _finish(math.exp(mu) / (math.exp(mu) + (1.0 / sigmas - 1.0)))


def from_scheduler_config(
    config: Mapping[str, Any],
    num_steps: int,
    num_image_tokens: int | None = None,
    *,
    evenly: bool = False,
) -> np.ndarray:
    """The schedule that a pipeline's scheduler_config.json describes.

    Args:
        config: that file's content. `use_dynamic_shifting` chooses FLUX's schedule, its absence
            SD3's.
        num_steps: T, at least 1.
        num_image_tokens: needed where the shift depends on the image's size.
        evenly: as FLUX's pipeline has it, the last step before the shift starts at 1 / T, and not
            at the smallest sigma of training. The shift by size implies it.

    Returns:
        [T + 1] float32 from 1 down to 0.

    Raises:
        ValueError: for another scheduler, for an option we do not follow (named with its
            value), or for a missing num_image_tokens.
    """
    name = config.get("_class_name", _SCHEDULER_CLASS)
    if name != _SCHEDULER_CLASS:
        raise ValueError(
            f"The scheduler is {name!r}; only {_SCHEDULER_CLASS!r} (flow matching) is supported."
        )
    for option, inert in _INERT_OPTIONS.items():
        # diffusers takes 0, null and false alike as "off" for everything but the type.
        value = config.get(option, inert)
        if (value or None) != (inert or None):
            raise ValueError(
                f"scheduler_config.json sets {option}={value!r}, which is not supported: "
                f"use a scheduler with {option}={inert!r}."
            )
    if not config.get("use_dynamic_shifting", False):
        if evenly:
            _check_num_steps(num_steps)
            return _finish(
                _shift(np.linspace(1.0, 1.0 / num_steps, num_steps), config.get("shift", 1.0))
            )
        return sd3_sigmas(
            num_steps, config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
        )
    if num_image_tokens is None:
        raise ValueError(
            "scheduler_config.json sets use_dynamic_shifting=True, so the schedule depends on "
            "the image's size: pass num_image_tokens."
        )
    return flux_sigmas(
        num_steps,
        num_image_tokens,
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
    )


def _shift(sigma: Any, shift: float) -> Any:
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def _finish(sigmas: np.ndarray) -> np.ndarray:
    return np.append(sigmas, 0.0).astype(np.float32)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: a sampler takes at least one step.")
