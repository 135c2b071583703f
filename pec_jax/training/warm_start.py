"""Where training starts: at the base model, or at what `config.trainable.init` names.

The reference of a KL constraint stays the base model without any adapter, as in Flow-GRPO, which
disables its LoRA for it. What is called the base in evaluations is the model before training, that
is with `init`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pec_jax.config import Config, ConfigError
from pec_jax.families.base import Pipeline
from pec_jax.families.pipeline import load_pipeline
from pec_jax.models import lora
from pec_jax.models.layers import expand_runs
from pec_jax.training.learned import Learned, LearnedLora, LearnedRun, open_learned
from pec_jax.training.parts import trainable_params
from pec_jax.types import PyTree

_LISTED = 3  # layers that a message names


def open_start(config: Config, root: Path) -> Learned | None:
    """What `config.trainable.init` names; None if it is empty. No weights are loaded.

    Args:
      config: the run's.
      root: directory of its pipeline.

    Raises:
      ConfigError: it is nothing that a LoRA of this config can start as.
      RunError, WeightsError: as `open_learned`.
    """
    init = config.trainable.init
    if not init:
        return None
    start = open_learned(init, root)
    if config.trainable.mode == "full":
        return start
    if not config.trainable.alpha:
        raise ConfigError("config.trainable.alpha is 0: then no LoRA is that of trainable.init.")
    if isinstance(start, LearnedRun) and start.config.trainable.mode == "full":
        raise _refused(init, "is a run that has trained the whole transformer, which is no LoRA")
    if isinstance(start, LearnedLora):
        if not start.adapter.is_plain:
            raise _refused(init, "has biases or magnitudes (DoRA), which a LoRA of ours has not")
        shapes = load_pipeline(root, text=False, weights=False).transformer_variables["params"]
        fresh = jax.eval_shape(functools.partial(trainable_params, config), shapes)
        _check_fit(config, fresh, start.adapter.factors)
    return start


def initial_params(config: Config, pipeline: Pipeline, start: Learned | None) -> PyTree:
    """What learns, as it is before training.

    With a LoRA, b is that of `start` by the ratio of both scales, so that the model is the same
    whatever `config.trainable.alpha` is; with mode full, `start` is merged into the weights.

    Args:
      config: the run's.
      pipeline: with the base model's weights.
      start: from `open_start`.

    Raises:
      ConfigError: the start has other layers or another rank than the config's LoRA.
    """
    base = pipeline.transformer_variables
    fresh = trainable_params(config, base["params"])
    if start is None:
        return fresh
    if config.trainable.mode == "full":
        exact = dataclasses.replace(pipeline, transformer_variables={**base, "params": fresh})
        found = start.variables(exact)
        return lora.merge(found["params"], found.get("lora", {}))
    factors = start.variables(pipeline)["lora"]
    _check_fit(config, fresh, factors)
    scale = config.trainable.alpha / config.trainable.rank
    return traverse_util.unflatten_dict(
        {
            path: jnp.asarray(value, jnp.float32) / (scale if path[-1] == "b" else 1.0)
            for path, value in traverse_util.flatten_dict(factors).items()
        }
    )


def _check_fit(config: Config, fresh: PyTree, factors: PyTree) -> None:
    """Raises ConfigError unless both adapt the same layers with the config's rank."""
    paths = traverse_util.flatten_dict(fresh)
    wanted = {name for path in paths for name in expand_runs(path[:-1])}
    ranks = _ranks(traverse_util.flatten_dict(factors))
    rank = config.trainable.rank
    parts = []
    if lacking := sorted(wanted - set(ranks)):
        parts.append(f"does not adapt {_listing(lacking)}, which config.trainable.targets match")
    if surplus := sorted(set(ranks) - wanted):
        parts.append(f"adapts {_listing(surplus)}, which config.trainable.targets do not match")
    if others := sorted(name for name in set(ranks) & wanted if ranks[name] != rank):
        parts.append(
            f"has rank {ranks[others[0]]} in {_listing(others)}, where config.trainable.rank is "
            f"{rank}"
        )
    if parts:
        raise _refused(config.trainable.init, "; it ".join(parts))


def _ranks(factors: Mapping[tuple[str, ...], Any]) -> dict[str, int]:
    """Layer -> its rank. What is zero in both a and b only fills up a run, and never learns."""
    ranks = {}
    for (*modules, half), a in factors.items():
        if half != "a":
            continue
        names, b = expand_runs(modules), factors[(*modules, "b")]
        used = np.asarray(jnp.any(a != 0, axis=-2) | jnp.any(b != 0, axis=-1))
        for name, count in zip(names, used.reshape(len(names), -1).sum(-1)):
            if count:
                ranks[name] = int(count)
    return ranks


def _refused(init: str, reason: str) -> ConfigError:
    return ConfigError(
        f"config.trainable.init={init} {reason}. Change config.trainable, or take "
        "config.trainable.mode=full, which merges it into the weights."
    )


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
