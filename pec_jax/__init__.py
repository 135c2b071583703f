"""Diversity-preserving RL fine-tuning of flow-matching image models in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

# What a notebook needs -> the module that has it, imported at first use.
_PUBLIC = {
    "Config": "pec_jax.config.schema",
    "draw": "pec_jax.inference.draw:run",
    "DrawRequest": "pec_jax.inference.draw:Request",
    "FlowSampler": "pec_jax.flow.sampler",
    "from_config_dict": "pec_jax.config.schema",
    "gaussian_surprisal": "pec_jax.perception.entropy",
    "knn_surprisal": "pec_jax.perception.entropy",
    "load_config": "pec_jax.config.files",
    "load_pipeline": "pec_jax.families.pipeline",
    "logdet_surprisal": "pec_jax.perception.entropy",
    "Policy": "pec_jax.rl.policy",
    "train": "pec_jax.training.trainer",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
