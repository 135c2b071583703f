"""Rewards: one definition per file, in the graph, on the host, or a user's own."""

from pec_jax.config.fields import field
from pec_jax.rewards.base import ModelRewardOptions, Reward, RewardOptions, register

__all__ = ["ModelRewardOptions", "Reward", "RewardOptions", "field", "register"]
