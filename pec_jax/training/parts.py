"""What learns and how: the objective, constraints, optimizer and parameters that a config names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from pec_jax.config import Config
from pec_jax.config.registry import OBJECTIVES
from pec_jax.models import lora
from pec_jax.rl.composition import Constraints
from pec_jax.rl.objective import Objective
from pec_jax.types import PyTree

_LORA_STREAM = 0  # the others are in `build`


def make_objective(config: Config) -> Objective:
    """The chosen objective."""
    return OBJECTIVES[config.objective.name].make(config.objective.options)


def make_constraints(config: Config, objective: Objective) -> Constraints:
    """Those that are on.

    Raises:
        ConfigError: two that exclude each other, or one that the objective cannot serve.
    """
    return Constraints.from_config(config.constraints, set(objective.provides))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, with a linear warm-up."""
    o = config.optimizer
    rate = o.learning_rate
    if o.warmup_steps:
        rate = optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
    adamw = optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return optax.chain(optax.clip_by_global_norm(o.grad_clip), adamw) if o.grad_clip else adamw


def trainable_params(config: Config, params: PyTree) -> PyTree:
    """What learns, as it is before training: a LoRA that does nothing yet, or the weights.

    Args:
        config: the run's.
        params: of the base model's transformer.
    """
    if config.trainable.mode == "full":
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    key = jax.random.fold_in(jax.random.key(config.seed), _LORA_STREAM)
    return lora.init(params, config.trainable.targets, config.trainable.rank, key)
