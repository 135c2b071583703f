"""Self-distillation: crops, balanced assignments, and what its loss rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.world.pretraining import dino


def test_crops_of_a_picture_are_developed_each_on_its_own():
    """What is constant in all crops of a flat picture differs between them: exposure, contrast."""
    flat = jnp.full((8, 64, 64, 3), 0.3)
    means = [np.asarray(dino.developed(jax.random.key(i), flat)).mean((1, 2, 3)) for i in range(2)]
    assert np.abs(means[0] - means[1]).mean() > 0.02
