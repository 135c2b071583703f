"""The rule-based judge on scenes whose attributes are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes import judge
from pec_jax.shapes import scenes as shapes

NUM_SCENES = 2048


# Operation by operation, compilation would take most of the time.
detect = jax.jit(judge.detect)
score = jax.jit(judge.score)


@jax.jit
def draw(key, attributes):
    scene = shapes.sample_scene(key, attributes)
    return scene, shapes.render(scene)


@pytest.fixture(scope="module")
def scenes():
    return draw(jax.random.key(7), jnp.full((NUM_SCENES, 5), shapes.OPEN))


@jax.jit
def blur(images):
    """Binomial blur [1, 2, 1] / 4 both ways, about what a small VAE leaves."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4


@jax.jit
def add_noise(images):
    noise = 0.03 * jax.random.normal(jax.random.key(0), images.shape)
    return jnp.clip(images + noise, 0.0, 1.0)


def scenes_of(caption, seed=0):
    attributes = jnp.tile(jnp.asarray(shapes.parse(caption)), (64, 1))
    return draw(jax.random.key(seed), attributes)[1]


@pytest.mark.parametrize(
    ("spoil", "accuracy"),
    [
        (lambda images: images, 0.99),
        (blur, 0.97),
        (add_noise, 0.97),
        (lambda images: add_noise(blur(images)), 0.97),
        (lambda images: jax.image.resize(images, (NUM_SCENES, 64, 64, 3), "cubic"), 0.99),
    ],
    ids=["clean", "blur", "noise", "blur and noise", "64 px"],
)
def test_accuracy_on_every_attribute(scenes, spoil, accuracy):
    scene, images = scenes
    detected = detect(spoil(images))
    right = np.asarray(detected.attributes == scene.attributes).mean(axis=0)
    assert (right >= accuracy).all(), dict(zip(shapes.ATTRIBUTES, right))
    assert np.mean(detected.found) >= accuracy
    np.testing.assert_allclose(detected.color, scene.color, atol=0.2)
    np.testing.assert_allclose(detected.center, scene.center, atol=0.75)
    assert np.abs(np.asarray(detected.radius) - np.asarray(scene.radius)).mean() < 0.1


def test_large_images(scenes):
    scene, images = scenes
    large = jnp.repeat(jnp.repeat(images[:64], 8, axis=1), 8, axis=2)  # 256 px
    detected = detect(large)
    np.testing.assert_array_equal(detected.attributes, scene.attributes[:64])


def test_no_object_is_found_where_there_is_none():
    key = jax.random.key(0)
    grey = jnp.full((8, 32, 32, 3), 0.5)
    empty = [
        grey,
        grey + 0.03 * jax.random.normal(key, grey.shape),
        jax.random.uniform(key, grey.shape),
        jnp.broadcast_to(jnp.linspace(0, 1, 32)[:, None, None], grey.shape),
    ]
    assert not np.asarray(detect(jnp.concatenate(empty)).found).any()


def test_a_second_object_spoils_the_first():
    left = scenes_of("a small red circle on the left on a dark background")
    right = scenes_of("a small green square on the right on a dark background", seed=1)
    assert np.asarray(detect(left).found).all()
    assert not np.asarray(detect(jnp.maximum(left, right)).found).any()
    same = scenes_of("a small red square on the right on a dark background", seed=1)
    assert not np.asarray(detect(jnp.maximum(left, same)).found).any()


def test_score_is_the_share_of_what_is_named():
    images = scenes_of("a small red circle at the top on a dark background")[:6]
    captions = [
        "a small red circle at the top on a dark background",
        "a small blue circle at the top on a dark background",
        "a blue circle",
        "a large blue square at the bottom on a light background",
        "a shape",
        "a red shape",
    ]
    attributes = jnp.stack([jnp.asarray(shapes.parse(c)) for c in captions])
    np.testing.assert_allclose(score(images, attributes), [1, 0.8, 0.5, 0, 1, 1])
    strict = [True, False, False, False, True, True]
    np.testing.assert_array_equal(jax.jit(judge.all_right)(images, attributes), strict)


def test_nothing_found_scores_nothing_and_nan_is_not_hidden():
    images = jnp.stack([jnp.full((32, 32, 3), 0.1), jnp.full((32, 32, 3), jnp.nan)])
    attributes = jnp.stack([jnp.asarray(shapes.parse(c)) for c in ("a shape", "a shape")])
    scores = np.asarray(score(images, attributes))
    assert scores[0] == 0.0 and np.isnan(scores[1])
    named = jnp.asarray(shapes.parse("a shape on a dark background"))[None]
    assert score(images[:1], named)[0] == 0.0  # right about the background, but empty
    assert not jax.jit(judge.all_right)(images, attributes).any()
