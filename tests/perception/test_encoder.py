"""What an encoder is, and how one becomes known to configs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.config import ConfigError, from_config_dict
from pec_jax.config.fields import field
from pec_jax.config.registry import ENCODERS
from pec_jax.perception.definition import EncoderOptions, register
from pec_jax.perception.encoder import Encoder, unit
from pec_jax.training.build import make_judges


def test_unit_features():
    features = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit(features), [[0.6, 0.8], [0.0, 0.0]], atol=1e-6)
    assert np.isfinite(jax.grad(lambda f: unit(f).sum())(features)).all()


@dataclasses.dataclass(frozen=True)
class GridOptions(EncoderOptions):
    """One option more than every encoder has."""

    cells: int = field("Along each side.", 2, low=1)


@pytest.fixture
def grid(monkeypatch):
    """A user's own encoder without weights: the mean colours of a grid's cells."""
    monkeypatch.setattr(ENCODERS, "_entries", {name: ENCODERS[name] for name in ENCODERS})

    @register("grid", GridOptions)
    def make(options, networks):
        networks.variables["grid"] = {}
        cells = (options.cells, options.cells, 3)
        features = lambda _, images: jax.image.resize(  # noqa: E731
            images, (len(images), *cells), "linear"
        ).reshape(len(images), -1)
        return Encoder("grid", "grid", int(np.prod(cells)), features)


class NoNetworks:
    """For definitions that load nothing."""

    def __init__(self):
        self.variables = {}


def test_an_encoder_of_ones_own_is_a_perceptual_space(grid, small_config):
    for name in small_config.encoders:
        small_config.encoders[name].evaluate = False
    for name in small_config.rewards:
        small_config.rewards[name].update(
            {"weight": float(name == "attributes"), "evaluate": False}
        )
    small_config.perception.encoder = "grid"
    small_config.encoders = {**small_config.encoders.to_dict(), "grid": {"cells": 3}}
    judges = make_judges(from_config_dict(small_config), NoNetworks())
    assert list(judges.spaces) == ["grid"] and judges.spaces["grid"].share == 1
    features = judges.spaces["grid"].features({}, jnp.ones((2, 32, 32, 3)))
    assert features.shape == (2, 27)
    small_config.encoders.grid.cells = 0
    with pytest.raises(ConfigError, match=r"config\.encoders\.grid\.cells is 0"):
        from_config_dict(small_config)
