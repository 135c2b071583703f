"""The contrastive objective and its batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import clip, common


def unit(key, n, d=8):
    return common.normalise(jax.random.normal(key, (n, d)))


def test_loss_equals_clips_when_all_captions_differ():
    image, text = unit(jax.random.key(0), 6), unit(jax.random.key(1), 6)
    logits = 7.0 * np.asarray(image @ text.T)

    def cross_entropy(rows):
        return np.mean(np.log(np.exp(rows).sum(-1)) - np.diag(rows))

    wanted = 0.5 * (cross_entropy(logits) + cross_entropy(logits.T))
    got = clip.contrastive_loss(image, text, 7.0, jnp.arange(6))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_equal_captions_are_no_negatives():
    """Two groups of equal captions, told apart perfectly, are worth log 2 and not more."""
    directions = jnp.eye(2)[jnp.array([0, 0, 1, 1])]
    captions = jnp.array([5, 5, 9, 9])
    value = clip.contrastive_loss(directions, directions, 100.0, captions)
    np.testing.assert_allclose(value, np.log(2.0), rtol=1e-5)
    naive = clip.contrastive_loss(directions, directions, 100.0, jnp.arange(4))
    gradient = jax.grad(lambda x: clip.contrastive_loss(x, directions, 10.0, captions))(directions)
    np.testing.assert_allclose(naive, np.log(2.0), rtol=1e-5)
    # Pushing equal captions apart would show as a gradient between the equal rows.
    np.testing.assert_allclose(gradient[0], gradient[1], atol=1e-6)


def test_captions_of_a_batch_are_true_of_its_images():
    images, attributes, captions = clip.captioned_images(jax.random.key(0), 128)
    assert images.shape == (128, 64, 64, 3)
    named = shapes.all_attributes()[np.asarray(captions)]
    mentioned = named >= 0
    np.testing.assert_array_equal(named[mentioned], np.asarray(attributes)[mentioned])


def test_retrieval_counts_nearest_texts_whatever_their_length():
    text = np.array([[1.0, 0.0], [0.0, 100.0]])
    image = np.array([[5.0, 1.0], [0.1, 3.0], [0.0, 1.0]])
    assert clip.retrieval(image, text, np.array([0, 1, 0])) == 2 / 3
