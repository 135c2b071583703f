"""Rewards: one signature, a registry, and scorers that run inside the train step."""

from pec_jax.rewards import attributes
from pec_jax.rewards.base import REGISTRY, CombinedReward, Reward, combine, make, register

__all__ = ["REGISTRY", "CombinedReward", "Reward", "attributes", "combine", "make", "register"]
