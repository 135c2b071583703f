"""The judge against the scenes that were drawn: it reads them off, and tells what is none."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes import finish, judge, render, scenes

N = 512


@functools.cache
def _drawn(defects: str):
    """Scenes, their finish's defects, and the judge's opinion of the pictures."""
    scene = scenes.sample_scene(jax.random.key(0), jnp.full((N, 6), scenes.OPEN))
    values = {
        "none": jnp.zeros((N, 5)),
        "web": finish.draw_defects(jax.random.key(1), N),
        "worst": jnp.ones((N, 5)),
    }
    values |= {name: jnp.zeros((N, 5)).at[:, i].set(1.0) for i, name in enumerate(finish.DEFECTS)}
    done = finish.from_defects(jax.random.key(2), values[defects])
    images = render.render(jax.random.key(3), scene, done)
    return np.asarray(scene.attributes), np.asarray(values[defects]), images, _detect(images)


_detect = jax.jit(judge.detect)


# Blur and over-exposure take away what tells small stars from cats and red from pink.
@pytest.mark.parametrize(
    ("defects", "strict"),
    [("none", 0.995), ("web", 0.95), ("worst", 0.85), ("focus", 0.9), ("framing", 0.995)],
)
def test_scenes_are_read_off(defects, strict):
    attributes, _, _, detected = _drawn(defects)
    right = (np.asarray(detected.attributes) == attributes) & np.asarray(detected.found)[:, None]
    assert right.all(-1).mean() >= strict
    assert right.mean(0).min() >= strict


@pytest.mark.parametrize("index", range(5), ids=finish.DEFECTS)
def test_each_defect_is_measured(index):
    """Also beside the others, to within a tenth on the mean."""
    name = finish.DEFECTS[index]
    none = np.asarray(_drawn("none")[3].defects)[:, index]
    alone = np.asarray(_drawn(name)[3].defects)[:, index]
    _, truth, _, detected = _drawn("web")
    web = np.asarray(detected.defects)[:, index]
    assert none.mean() < 0.15 and alone.mean() > 0.85
    assert abs(np.mean(web - truth[:, index])) < 0.1
    assert np.corrcoef(web, truth[:, index])[0, 1] > 0.85


def test_finish_is_measured():
    _, truth, _, detected = _drawn("web")
    measured, known = np.asarray(finish.score(detected.defects)), 1 - truth.mean(-1)
    assert np.corrcoef(measured, known)[0, 1] > 0.97
    assert abs(np.mean(measured - known)) < 0.03


@pytest.mark.parametrize("kind", ["empty", "flat", "noise", "clutter"])
def test_what_is_no_picture_of_the_world_is_not_found(kind):
    scene = scenes.sample_scene(jax.random.key(5), jnp.full((32, 6), scenes.OPEN))
    empty = render.background(scene.sky, scene.ground, scene.horizon, jnp.zeros(32))
    noise = jax.random.uniform(jax.random.key(6), empty.shape)
    images = {
        "empty": empty,
        "flat": jnp.full_like(empty, 0.5),
        "noise": noise,
        "clutter": jnp.where(noise[..., :1] < 0.3, noise, empty),
    }[kind]
    assert np.mean(np.asarray(_detect(images).found)) <= 0.1


def test_score_is_the_share_of_what_is_named():
    attributes, _, images, _ = _drawn("none")
    wrong = np.array(attributes)
    wrong[:, scenes.COLOR] = (wrong[:, scenes.COLOR] + 1) % 6
    half = np.where(np.arange(6) < 3, wrong, scenes.OPEN)
    sub = slice(0, 64)
    assert float(jnp.mean(judge.score(images[sub], jnp.asarray(attributes[sub])))) > 0.99
    found = np.asarray(judge.score(images[sub], jnp.asarray(half[sub])))
    np.testing.assert_allclose(np.median(found), 2 / 3, atol=1e-6)
    assert np.mean(np.asarray(judge.all_right(images[sub], jnp.asarray(wrong[sub])))) == 0.0


def test_an_image_that_is_not_finite_is_noticed():
    attributes, _, images, _ = _drawn("none")
    broken = images[:4].at[1, 3, 3, 0].set(jnp.nan)
    found = np.isnan(np.asarray(judge.score(broken, jnp.asarray(attributes[:4]))))
    np.testing.assert_array_equal(found, [False, True, False, False])


def test_larger_images_are_read_too():
    attributes, _, images, _ = _drawn("none")
    large = jnp.repeat(jnp.repeat(images[:64], 2, axis=1), 2, axis=2)
    assert float(jnp.mean(judge.score(large, jnp.asarray(attributes[:64])))) > 0.97
