"""Self-distillation: albums, photographs, balanced assignments, and what its loss rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.shapes import judge
from pec_jax.shapes.pretraining import common, dino, skeleton


def test_pictures_of_an_album_agree_in_what_its_caption_names():
    values = []
    for key in jax.random.split(jax.random.key(3), 16):
        attributes = np.asarray(dino.album(key).attributes)
        assert attributes.shape == (dino.ALBUM, 6)
        values.append([len(set(column)) for column in attributes.T])
    varying = np.array(values) > 1  # [albums, attributes]
    assert 0.55 < varying.mean() < 0.75  # 0.65 on the average
    assert varying.any(1).mean() > 0.9


def test_two_photographs_show_one_scene_with_two_finishes():
    scene = dino.album(jax.random.key(0))
    photographs = [dino.photograph(jax.random.key(i), scene) for i in range(2)]
    detected = [judge.detect(images) for images in photographs]
    same = np.asarray(detected[0].attributes == detected[1].attributes).all(-1)
    assert same.mean() > 0.9
    change = np.abs(np.asarray(detected[0].defects - detected[1].defects)).mean(0)
    assert (change > 0.1).all()


def test_hidden_patches_are_grey_and_the_others_untouched():
    pixels = common.to_pixels(common.draw_pictures(jax.random.key(0), 64).images)
    hidden = np.asarray(dino.hide_patches(jax.random.key(1), pixels))
    patch = skeleton.VIT["patch_size"]
    blocks = [
        a.reshape(64, 64 // patch, patch, 64 // patch, patch, 3)
        for a in (hidden, np.asarray(pixels))
    ]
    grey = (blocks[0] == 0.0).all((2, 4, 5))
    assert 0.2 < grey.mean() < 0.4
    assert grey.mean((1, 2)).max() < dino.HIDDEN_SHARE + 0.2
    seen = np.broadcast_to(~grey[:, :, None, :, None, None], blocks[0].shape)
    np.testing.assert_array_equal(blocks[0][seen], blocks[1][seen])


def test_sinkhorn_gives_every_prototype_its_share():
    logits = jax.random.uniform(jax.random.key(0), (64, 8), minval=-1.0)
    logits = logits.at[:, 0].add(1.0)  # a prototype that all would choose
    q = dino.sinkhorn(logits)
    np.testing.assert_allclose(q.sum(axis=1), 1.0, rtol=1e-5)
    assert float(q.sum(axis=0).max()) < 1.5 * 64 / 8
    assert float(jax.nn.softmax(logits / 0.06, axis=1).sum(axis=0)[0]) > 3 * 64 / 8


def test_each_photograph_is_compared_with_the_other():
    targets = jax.nn.one_hot(jnp.array([[0, 1], [2, 3]]), 4)  # [2 photographs, N = 2, K = 4]
    confident = 10.0 * dino.STUDENT_TEMPERATURE
    assert float(dino.distillation_loss(confident * targets[::-1], targets)) < 1e-3
    assert float(dino.distillation_loss(confident * targets, targets)) > 5.0


def test_knn_takes_the_majority_by_direction():
    train = np.array([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 12)
    labels = np.array([0] * 6 + [1] * 12)
    found = dino.knn_accuracy(train, labels, np.array([[9.0, 0.1], [0.0, 0.1]]))
    assert found.tolist() == [0, 1]
