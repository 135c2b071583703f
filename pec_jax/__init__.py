"""Diversity-preserving RL fine-tuning of flow-matching image models in JAX."""

__version__ = "0.1.0"
