"""Entropy of open attributes: closed cases, and no bias with few images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes import diversity, scenes

VALID = jnp.ones((512, 16), bool)


def test_one_value_has_none():
    found = diversity.attribute_entropy(jnp.full((512, 16), 3), VALID, 6)
    np.testing.assert_array_equal(found, 0.0)


def test_an_even_split_has_all():
    values = jnp.broadcast_to(jnp.arange(16) % 4, (512, 16))
    np.testing.assert_allclose(diversity.attribute_entropy(values, VALID, 4), 1.0)


@pytest.mark.parametrize("num_values", scenes.NUM_VALUES)
def test_sixteen_images_suffice(num_values):
    values = jax.random.randint(jax.random.key(0), (512, 16), 0, num_values)
    found = diversity.attribute_entropy(values, VALID, num_values)
    assert 0.95 < float(jnp.mean(found)) <= 1.0


def test_what_is_not_valid_does_not_count():
    values = jnp.array([[0, 1, 2, 2, 0, 1, -2, -2]])
    valid = jnp.array([[True, True, False, False, True, True, True, True]])
    expected = (np.log(2) + 1 / 8) / np.log(3)
    np.testing.assert_allclose(diversity.attribute_entropy(values, valid, 3), [expected], rtol=1e-6)
    nothing = diversity.attribute_entropy(values, jnp.zeros_like(valid), 3)
    np.testing.assert_array_equal(nothing, [0.0])


def test_only_open_attributes_are_averaged():
    attributes = jnp.zeros((2, 16, 6), jnp.int32).at[..., 0].set(jnp.arange(16) % 3)
    attributes = attributes.at[:, :, 1].set(jnp.arange(16) % 2)
    named = jnp.array([[-1, 0, 0, 0, 0, 0], [-1, -1, -1, -1, 0, 0]])
    found = np.asarray(diversity.open_attributes(attributes, jnp.ones((2, 16), bool), named))
    assert found[0] == pytest.approx(1.0, abs=0.01)
    assert found[1] == pytest.approx(0.5, abs=0.01)
    everything = diversity.open_attributes(attributes, jnp.ones((2, 16), bool), 0 * named)
    assert np.all(np.isnan(np.asarray(everything)))
