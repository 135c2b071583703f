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
      ConfigError: a LoRA of this config cannot start as it: other layers, another rank or kind.
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
    shapes = load_pipeline(root, text=False, weights=False).transformer_variables["params"]
    layers = _layers(config, shapes)
    if isinstance(start, LearnedRun):
        if start.config.trainable.mode == "full":
            raise _refused(init, "is a run that has trained the whole transformer")
        theirs = _layers(start.config, shapes)
        _check_fit(config, layers, dict.fromkeys(theirs, start.config.trainable.rank))
    if isinstance(start, LearnedLora):
        if not start.adapter.is_plain:
            raise _refused(init, "has biases or magnitudes (DoRA), which a LoRA of ours has not")
        _check_fit(config, layers, _ranks(start.adapter))
    return start


def initial_params(config: Config, pipeline: Pipeline, start: Learned | None) -> PyTree:
    """What learns, as it is before training.

    With a LoRA, b is that of `start` by the ratio of both scales, so that the model is the same
    whatever `config.trainable.alpha` is; with mode full, `start` is merged into the weights.

    Args:
      config: the run's.
      pipeline: with the base model's weights.
      start: from `open_start`, which has seen to it that it fits.

    Raises:
      RunError, CheckpointError: as `Learned.variables`.
    """
    base = pipeline.transformer_variables
    fresh = trainable_params(config, base["params"])
    if start is None:
        return fresh
    if config.trainable.mode == "full":
        exact = dataclasses.replace(pipeline, transformer_variables={**base, "params": fresh})
        found = start.variables(exact)
        return lora.merge(found["params"], found.get("lora", {}))
    factors = traverse_util.flatten_dict(start.variables(pipeline)["lora"])
    scale = config.trainable.alpha / config.trainable.rank
    return traverse_util.unflatten_dict(
        {
            path: jnp.asarray(value, jnp.float32) / (scale if path[-1] == "b" else 1.0)
            for path, value in factors.items()
        }
    )


def _layers(config: Config, shapes: PyTree) -> list[str]:
    """The layers that a config's LoRA adapts."""
    fresh = jax.eval_shape(functools.partial(trainable_params, config), shapes)
    paths = traverse_util.flatten_dict(fresh)
    return [name for path in paths if path[-1] == "a" for name in expand_runs(path[:-1])]


def _ranks(adapter: lora.Adapter) -> dict[str, int]:
    """Layer -> its rank. What is zero in both a and b only fills up a run, and never learns."""
    ranks, factors = {}, traverse_util.flatten_dict(adapter.factors)
    for (*modules, half), a in factors.items():
        if half != "a":
            continue
        names, b = expand_runs(modules), factors[(*modules, "b")]
        used = np.any(a != 0, axis=-2) | np.any(b != 0, axis=-1)
        for name, count in zip(names, used.reshape(len(names), -1).sum(-1)):
            if count:
                ranks[name] = int(count)
    return ranks


def _check_fit(config: Config, layers: Sequence[str], ranks: Mapping[str, int]) -> None:
    """Raises ConfigError unless just these layers are adapted, all with the config's rank."""
    rank, parts = config.trainable.rank, []
    if lacking := sorted(set(layers) - set(ranks)):
        parts.append(f"does not adapt {_listing(lacking)}, which config.trainable.targets match")
    if surplus := sorted(set(ranks) - set(layers)):
        parts.append(f"adapts {_listing(surplus)}, which config.trainable.targets do not match")
    if others := sorted(name for name in set(ranks) & set(layers) if ranks[name] != rank):
        parts.append(
            f"has rank {ranks[others[0]]} in {_listing(others)}, where config.trainable.rank is "
            f"{rank}"
        )
    if parts:
        raise _refused(config.trainable.init, "; it ".join(parts))


def _refused(init: str, reason: str) -> ConfigError:
    return ConfigError(
        f"config.trainable.init={init} {reason}. Change config.trainable, or take "
        "config.trainable.mode=full, which merges it into the weights."
    )


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
