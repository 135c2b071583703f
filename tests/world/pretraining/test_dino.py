"""Self-distillation: crops, balanced assignments, and what its loss rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.world.pretraining import common, dino


def test_a_crop_of_the_whole_image_is_the_image():
    images = common.draw_pictures(jax.random.key(0), 4).images
    crops = dino.random_crops(jax.random.key(1), images, (1.0, 1.0))
    np.testing.assert_allclose(crops, images, atol=1e-5)


def test_crops_are_windows_of_a_ramp():
    """On a linear ramp a crop is a ramp again, with the slope of its side."""
    ramp = jnp.broadcast_to(jnp.linspace(0.0, 1.0, 64)[None, :, None, None], (64, 64, 64, 3))
    crops = np.asarray(dino.random_crops(jax.random.key(0), ramp, (0.25, 0.25)))
    slopes = crops[:, 40, 0, 0] - crops[:, 20, 0, 0]
    np.testing.assert_allclose(slopes, 0.5 * 20 / 63, atol=1e-4)
    starts = crops[:, 0, 0, 0]
    assert starts.min() < 0.1
    assert starts.max() > 0.4


def test_sinkhorn_gives_every_prototype_its_share():
    logits = jax.random.uniform(jax.random.key(0), (64, 8), minval=-1.0)
    logits = logits.at[:, 0].add(1.0)  # a prototype that all would choose
    q = dino.sinkhorn(logits)
    np.testing.assert_allclose(q.sum(axis=1), 1.0, rtol=1e-5)
    assert float(q.sum(axis=0).max()) < 1.5 * 64 / 8
    assert float(jax.nn.softmax(logits / 0.06, axis=1).sum(axis=0)[0]) > 3 * 64 / 8


def test_loss_compares_different_crops_only():
    targets = jax.nn.one_hot(jnp.array([[0, 1], [2, 3]]), 4)  # [G = 2, N = 2, K = 4]
    confident = 10.0 * dino.STUDENT_TEMPERATURE
    # Each crop says what the *other* large crop was assigned: the loss is nearly nothing.
    swapped = confident * targets[::-1]
    assert float(dino.distillation_loss(swapped, targets)) < 1e-3
    assert float(dino.distillation_loss(confident * targets, targets)) > 5.0


def test_knn_takes_the_majority_by_direction():
    train = np.array([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 12)
    labels = np.array([0] * 6 + [1] * 12)
    found = dino.knn_accuracy(train, labels, np.array([[9.0, 0.1], [0.0, 0.1]]))
    assert found.tolist() == [0, 1]


def test_crops_of_a_picture_are_developed_each_on_its_own():
    """What is constant in all crops of a flat picture differs between them: exposure, contrast."""
    flat = jnp.full((8, 64, 64, 3), 0.3)
    means = [np.asarray(dino.developed(jax.random.key(i), flat)).mean((1, 2, 3)) for i in range(2)]
    assert np.abs(means[0] - means[1]).mean() > 0.02
