"""Clip-Cov: some samples that drive the entropy down most take no part in the loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pec_jax.config import ConfigError
from pec_jax.config.fields import field
from pec_jax.rl.constraint import Constraint, State, register, space_field, space_needs
from pec_jax.rl.signals import PerSample, Signals, covariances


@dataclasses.dataclass(frozen=True)
class ClipCovOptions:
    """Quantiles, for the absolute bounds of the source belong to thousands of tokens."""

    share: float = field("Of the samples in the band, dropped; 0 is off.", 0.0, low=0.0, high=1.0)
    band: tuple[float, ...] = field("Quantiles of the covariance.", (0.8, 1.0))
    space: str = space_field()

    def __post_init__(self) -> None:
        if len(self.band) != 2 or not 0 <= self.band[0] < self.band[1] <= 1:
            raise ConfigError(
                f"config.constraints.clip_cov.band is {self.band}; it must be two rising quantiles "
                "in [0, 1], such as (0.8, 1.0)."
            )


def pick_from_band(options: ClipCovOptions, signals: Signals, key: Array) -> Bool[Array, "... p k"]:
    """A random share of the samples whose covariance lies in the band.

    Source: Cui et al. 2025 (arXiv 2505.22617), Clip-Cov.
    """
    values = covariances(signals, options.space)
    low, high = jnp.nanquantile(values, jnp.asarray(options.band))
    picked = jax.random.uniform(key, values.shape) < options.share
    return picked & (values >= low) & (values <= high)


def drop_selected(
    options: ClipCovOptions, state: State, signals: Signals, losses: PerSample, selected: Array
) -> PerSample:
    """The losses, 0 for the selected."""
    return jnp.where(selected, 0.0, losses)


register(
    Constraint(
        name="clip_cov",
        label="Clip-Cov",
        options=ClipCovOptions,
        is_on=lambda options: options.share != 0,
        needs=space_needs,
        excludes=("kl_cov",),
        parameter="share",
        select=pick_from_band,
        sample_loss=drop_selected,
    )
)
