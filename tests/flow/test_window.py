"""Which steps are trained, and where a moving window is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.flow.window import AT_RANDOM, FORWARD, Motion, stochastic_steps


@pytest.mark.parametrize(
    ("num_steps", "window", "fraction", "expected"),
    [
        (10, None, 0.99, range(9)),
        (2, None, 0.99, range(1)),
        (100, None, 0.99, range(99)),
        (10, None, 1.0, range(10)),
        (10, None, 0.5, range(5)),
        (10, (2, 4), 0.99, range(2, 4)),
        (10, (0, 10), 0.99, range(10)),
    ],
)
def test_stochastic_steps(num_steps, window, fraction, expected):
    steps = stochastic_steps(num_steps, window, fraction)
    assert steps == tuple(t in expected for t in range(num_steps))
    assert all(type(s) is bool for s in steps)


@pytest.mark.parametrize("window", [(3, 3), (4, 2), (-1, 2), (8, 11)])
def test_bad_window_is_refused(window):
    with pytest.raises(ValueError, match="window"):
        stochastic_steps(10, window)


def test_a_run_without_trained_steps_is_refused():
    with pytest.raises(ValueError, match="No step of 1"):
        stochastic_steps(1)
    with pytest.raises(ValueError, match="train_fraction is 0"):
        stochastic_steps(10, train_fraction=0.0)


def offsets(motion, count, key=0):
    return [int(motion.offset(jnp.int32(i), jax.random.key(key))) for i in range(count)]


def test_forward_goes_on_by_a_step_and_begins_again():
    assert offsets(Motion(3, FORWARD), 7) == [0, 1, 2, 0, 1, 2, 0]
    assert offsets(Motion(3, FORWARD, 2), 8) == [0, 0, 1, 1, 2, 2, 0, 0]


def test_at_random_reaches_all_places_alike():
    """Of 400 draws from 4 places, each comes 100 times, with a standard deviation of 8.7."""
    found = offsets(Motion(4, AT_RANDOM), 400)
    assert np.all(np.abs(np.bincount(found, minlength=4) - 100) < 5 * 8.7)
    assert offsets(Motion(4, AT_RANDOM), 20, key=1) != found[:20]
    stays = offsets(Motion(4, AT_RANDOM, 5), 20)
    assert stays[::5] == stays[4::5] and len(set(stays)) > 1
