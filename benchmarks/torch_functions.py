"""The arithmetic of the torch step, and which configs it knows; no networks."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pec_jax.config import Config, ConfigError, registry

KERNELS, OBJECTIVES, CONSTRAINTS = ("flow_sde",), ("grpo",), ("pec",)
ESTIMATORS, REWARDS = ("gaussian", "knn"), ("clip", "pickscore")


def check(config: Config) -> None:
    """Raises ConfigError for what this step does not know, in one sentence."""
    used = [name for name, options in config.rewards.items() if options.weight]
    constraints = [
        n for n, options in config.constraints.items() if registry.CONSTRAINTS[n].is_on(options)
    ]
    for field, values, known in (
        ("sampler.kernel", [config.sampler.kernel], KERNELS),
        ("sampler.window_moves", [config.sampler.window_moves], ("never",)),
        ("objective.name", [config.objective.name], OBJECTIVES),
        ("constraints", constraints, CONSTRAINTS),
        ("constraints.pec.space", [config.constraints["pec"].space], ("perceptual",)),
        ("perception.estimator", [config.perception.estimator], ESTIMATORS),
        ("perception.at", [config.perception.at], ("final",)),
        ("rewards", used, REWARDS),
        ("optimizer.warmup_steps", [config.optimizer.warmup_steps], (0,)),
    ):
        if rest := [str(value) for value in values if value not in known]:
            raise ConfigError(
                f"--torch does not know config.{field}={', '.join(rest)}; it knows "
                f"{', '.join(map(str, known))}."
            )


@dataclasses.dataclass(frozen=True)
class Signals:
    """What the update knows of the P * K images from the start; float32."""

    rewards: Tensor  # [P * K]
    bonus: Tensor  # [P * K] lambda times the surprisal, in the unit of the rewards
    mean: Tensor  # [P * K] of the group, bonus included
    std: Tensor  # [P * K] of the group or of the whole batch, likewise


def signals(config: Config, rewards: Tensor, surprisal: Tensor) -> Signals:
    """The statistics of whole groups, from rewards and surprisals [P, K]."""
    pec = config.constraints["pec"]
    weight = pec.weight
    if pec.unit == "reward_std":
        weight = weight * rewards.std(dim=1, correction=0, keepdim=True)
    bonus = weight * surprisal
    shaped = rewards + bonus
    std = shaped.std(correction=0)
    if config.updates.advantage_std == "group":
        std = shaped.std(dim=1, correction=0, keepdim=True)
    wide = (rewards, bonus, shaped.mean(dim=1, keepdim=True), std)
    return Signals(*(a.expand(rewards.shape).reshape(-1) for a in wide))


def advantages(found: Signals, images: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """Advantages [n] of some images; the bonus is weighted by the importance ratio [n], as in PEC.

    Flow-GRPO adds 1e-4 to the std.
    """
    reward = found.rewards[images] + ratio * found.bonus[images]
    centred = reward - found.mean[images]
    return (centred / (found.std[images] + 1e-4)).clamp(-clip, clip)


def log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Gaussian log-density [N], its mean over the dimensions, float32."""
    squares = (-0.5 * ((x_next.float() - mean) / std) ** 2).flatten(1).mean(1)
    return squares - math.log(std) - 0.5 * math.log(2 * math.pi)


def policy_loss(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """mean max(-A r, -A clip(r, 1 - e_low, 1 + e_high)), r = exp(logp - logp_old)."""
    ratio = torch.exp(logp - logp_old)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def gaussian_surprisal(f: Tensor, bandwidth: float) -> Tensor:
    """[..., K, d] -> [..., K] nats per dimension, around the group's mean."""
    distance = (f - f.mean(-2, keepdim=True)).square().mean(-1)
    return distance / (2 * bandwidth**2) + 0.5 * math.log(2 * math.pi * bandwidth**2)


def knn_surprisal(f: Tensor, k: int, min_distance: float = 1e-4) -> Tensor:
    """[..., K, d] -> [..., K] nats per dimension, by the k-th nearest neighbour."""
    num_images, dim = f.shape[-2:]
    squared = (f[..., :, None, :] - f[..., None, :, :]).square().sum(-1)
    squared.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    rho = squared.kthvalue(k, dim=-1).values.clamp(min=min_distance**2)
    log_volume = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)
    psi = torch.special.digamma(torch.tensor([float(num_images), float(k)], device=f.device))
    return 0.5 * rho.log() + (psi[0] - psi[1] + log_volume) / dim
