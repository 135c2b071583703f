"""Rewards: one signature, a registry, and scorers that run inside the train step."""

# Importing a scorer's file registers it.
from pec_jax.rewards import attributes, clip, pickscore
from pec_jax.rewards.base import REGISTRY, CombinedReward, Reward, combine, make, register
from pec_jax.rewards.host import host_reward

__all__ = [
    "REGISTRY",
    "CombinedReward",
    "Reward",
    "attributes",
    "clip",
    "combine",
    "host_reward",
    "make",
    "pickscore",
    "register",
]
