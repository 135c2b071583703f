"""The perceptual entropy of a run: which encoders, in which shares, by which estimator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pec_jax.config import ConfigError, unknown
from pec_jax.config.registry import ENCODERS
from pec_jax.config.schema import PerceptionConfig
from pec_jax.perception.entropy import ESTIMATORS, scale_features, schedule_bandwidth


def shares(config: PerceptionConfig) -> dict[str, float]:
    """Encoder name -> share of the sum, from "dino" or "dino + 0.5 * clip"; the shares sum to 1.

    Raises:
        ConfigError: not such a sum, a share that is not positive, or an unknown encoder.
    """
    text = config.encoder
    found: dict[str, float] = {}
    for term in text.split("+"):
        factor, star, name = term.rpartition("*")
        try:
            share = float(factor) if star else 1.0
        except ValueError:
            share = math.nan
        name = name.strip()
        if not name or not 0 < share < math.inf or name in found:
            raise ConfigError(
                f"config.perception.encoder is {text!r}; give an encoder's name, or a sum of "
                "several with positive factors, such as 'dino + 0.5 * clip'."
            )
        if name not in ENCODERS:
            raise ConfigError("config.perception.encoder: " + unknown("name", name, ENCODERS))
        found[name] = share
    total = sum(found.values())
    return {name: share / total for name, share in found.items()}


def estimators(
    config: PerceptionConfig, step_std: Float[Array | np.ndarray, " s"]
) -> dict[str, Callable[[Array], Array]]:
    """Every estimator with the config's options: raw features [..., K, d] -> [..., K].

    Args:
        config: of the run.
        step_std: of the policy's trained steps, for the bandwidth that is the policy's own; where
            there are none, and none is given, `gaussian` is left out.
    """
    options: dict[str, dict[str, float]] = {"logdet": {"eps": config.eps}, "knn": {"k": config.k}}
    if config.bandwidth or len(step_std):
        bandwidth = config.bandwidth or float(schedule_bandwidth(step_std))
        options["gaussian"] = {"bandwidth": bandwidth}

    def bound(name: str) -> Callable[[Array], Array]:
        estimate = functools.partial(ESTIMATORS[name], **options[name])
        return lambda features: estimate(scale_features(features, config.scale))

    return {name: bound(name) for name in ESTIMATORS if name in options}


def surprisal_function(
    config: PerceptionConfig, step_std: Float[Array | np.ndarray, " s"]
) -> Callable[[Mapping[str, Array]], Array]:
    """The configured estimator: raw features {encoder: [..., K, d]} -> surprisals [..., K].

    Raises:
        ConfigError: `gaussian` at the policy's own bandwidth, of a policy without noise.
    """
    spaces, known = shares(config), estimators(config, step_std)
    if config.estimator not in known:
        raise ConfigError(
            "config.perception.bandwidth is 0, the policy's own std, but its steps have no noise: "
            "give a bandwidth, or take another config.perception.estimator."
        )
    estimate = known[config.estimator]

    def surprisal(features: Mapping[str, Any]) -> Array:
        parts = [share * estimate(features[name]) for name, share in spaces.items()]
        return functools.reduce(jnp.add, parts)

    return surprisal
