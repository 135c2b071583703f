"""Momentum contrast: albums, photographs, and what its loss rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pec_jax.shapes import judge
from pec_jax.shapes.pretraining import dino


def test_pictures_of_an_album_agree_in_what_its_caption_names():
    values = []
    for key in jax.random.split(jax.random.key(3), 16):
        attributes = np.asarray(dino.album(key))
        assert attributes.shape == (dino.ALBUM, 6)
        values.append([len(set(column)) for column in attributes.T])
    varying = np.array(values) > 1  # [albums, attributes]
    assert 0.55 < varying.mean() < 0.75  # 0.65 on the average
    assert varying.any(1).mean() > 0.9


def test_two_photographs_show_one_scene_with_two_finishes():
    attributes = dino.album(jax.random.key(0))
    photographs = [dino.photograph(jax.random.key(i), attributes) for i in range(2)]
    detected = [judge.detect(images) for images in photographs]
    for found in detected:
        assert np.mean(np.asarray(found.attributes == attributes).all(-1)) > 0.9
    change = np.abs(np.asarray(detected[0].defects - detected[1].defects)).mean(0)
    assert (change > 0.1).all()


def test_a_batch_holds_both_photographs_of_each_scene():
    photographs = dino.draw(jax.random.key(0))
    assert photographs.shape == (2, dino.ALBUMS * dino.ALBUM, 64, 64, 3)
    assert -1.0 <= float(photographs.min()) < -0.5 < 0.5 < float(photographs.max()) <= 1.0
    first, second = (judge.detect(0.5 * part + 0.5).attributes for part in photographs)
    assert np.mean(np.asarray(first == second).all(-1)) > 0.85  # two in a hundred are misread


def test_loss_is_torchs_cross_entropy_of_cosines():
    student, teacher = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    logits = torch.nn.functional.cosine_similarity(
        torch.tensor(np.array(student))[:, :, None],
        torch.tensor(np.array(teacher))[:, None],
        dim=-1,
    )
    wanted = torch.nn.functional.cross_entropy(
        logits.reshape(15, 5) / dino.TEMPERATURE, torch.arange(5).repeat(3)
    )
    np.testing.assert_allclose(dino.contrastive_loss(student, teacher), wanted, rtol=1e-5)


def test_no_gradient_flows_to_the_teacher():
    features = jax.random.normal(jax.random.key(0), (2, 1, 4, 3))
    gradients = jax.grad(dino.contrastive_loss, argnums=(0, 1))(*features)
    assert float(jnp.abs(gradients[0]).max()) > 0 == float(jnp.abs(gradients[1]).max())


def test_knn_takes_the_majority_by_direction():
    train = np.array([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 12)
    labels = np.array([0] * 6 + [1] * 12)
    found = dino.knn_accuracy(train, labels, np.array([[9.0, 0.1], [0.0, 0.1]]))
    assert found.tolist() == [0, 1]
