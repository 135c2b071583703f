"""Finish: its distribution, and that each defect does what it says and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes import finish

KEY = jax.random.key(0)


def test_most_pictures_are_mediocre_and_few_are_good():
    score = np.asarray(finish.score(finish.draw_defects(KEY, 20000)))
    assert 0.35 < score.mean() < 0.45
    assert np.mean(score > 0.8) < 0.05
    assert np.mean(score > 0.95) < 0.005


def test_defects_go_together():
    correlation = np.corrcoef(np.asarray(finish.draw_defects(KEY, 20000)).T)
    assert correlation[~np.eye(5, dtype=bool)].min() > 0.3


def test_defects_survive_the_way_there_and_back():
    defects = finish.draw_defects(KEY, 64)
    back = finish.to_defects(finish.from_defects(jax.random.key(1), defects))
    np.testing.assert_allclose(back, defects, atol=1e-6)


def _developed(defect: str | None, image: jax.Array) -> np.ndarray:
    defects = jnp.array([[float(name == defect) for name in finish.DEFECTS]])
    return np.asarray(finish.develop(KEY, image, finish.from_defects(jax.random.key(2), defects)))


@pytest.fixture
def image():
    smooth = jnp.linspace(0.35, 0.65, 64)
    return jnp.broadcast_to(smooth[None, :, None, None], (1, 64, 64, 3))


def test_without_defects_nothing_changes(image):
    np.testing.assert_allclose(_developed(None, image), image, atol=2e-3)


def test_contrast_is_a_factor_around_middle_grey(image):
    expected = finish.WORST_CONTRAST * (np.asarray(image) - 0.5) + 0.5
    np.testing.assert_allclose(_developed("contrast", image), expected, atol=2e-3)


def test_exposure_is_added(image):
    shift = _developed("exposure", image) - np.asarray(image)
    np.testing.assert_allclose(np.abs(shift), finish.WORST_EXPOSURE, atol=2e-3)
    assert np.ptp(np.sign(shift)) == 0


def test_grain_is_grey_and_as_strong_as_it_says(image):
    noise = _developed("noise", image) - np.asarray(image)
    np.testing.assert_allclose(noise[..., 0], noise[..., 2], atol=2e-3)
    assert 0.5 * finish.WORST_GRAIN < noise.std() < finish.WORST_GRAIN


def test_blur_is_gaussian():
    """An edge becomes the normal distribution's: sum p (1 - p) = std / sqrt(pi)."""
    edge = jnp.broadcast_to(
        (jnp.arange(64) < 32).astype(jnp.float32)[None, :, None, None], (1, 64, 64, 3)
    )
    for std in (1.5, 3.0, 5.0):
        p = np.asarray(finish.blur(edge, jnp.array([std])))[0, :, 0, 0]
        np.testing.assert_allclose(np.sum(p * (1 - p)), std / np.sqrt(np.pi), rtol=0.03)
        np.testing.assert_allclose(p.sum(), 32.0, atol=1e-3)
