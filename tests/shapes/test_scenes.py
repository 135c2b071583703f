"""Scenes and captions: what is named can be read back, and objects have room."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.shapes import scenes

EVERYTHING_OPEN = jnp.full((512, 6), scenes.OPEN)


@pytest.fixture(scope="module")
def scene():
    return scenes.sample_scene(jax.random.key(0), EVERYTHING_OPEN)


def test_every_caption_is_read_back():
    attributes = scenes.all_attributes()
    captions = scenes.all_captions()
    assert len(set(captions)) == len(captions) == scenes.NUM_CAPTIONS
    found = np.stack([scenes.parse(text) for text in captions[::7]])
    np.testing.assert_array_equal(found, attributes[::7])


def test_captions_read_like_english():
    assert scenes.caption([1, 0, 0, 0, 2, -1]) == "two small red fish at the top"
    assert scenes.caption([0, -1, 1, -1, -1, 3]) == "an orange thing at sunset"
    assert scenes.caption([-1, -1, -1, 5, -1, 2]) == "some mushrooms in the snow"
    assert scenes.caption([0, 1, -1, 1, 4, -1]) == "a large cat in the middle"
    assert max(len(text.split()) for text in scenes.all_captions()) == 10


def test_other_words_name_nothing():
    np.testing.assert_array_equal(scenes.parse("Hello, world!"), [-1] * 6)
    np.testing.assert_array_equal(scenes.parse("Two CATS, in the centre."), [1, -1, -1, 1, 4, -1])


def test_caption_index_is_the_place_in_the_table():
    rows = scenes.all_attributes()[::101]
    np.testing.assert_array_equal(
        scenes.caption_index(jnp.asarray(rows)), np.arange(scenes.NUM_CAPTIONS)[::101]
    )


def test_open_attributes_are_uniform_and_named_ones_kept():
    named = jnp.tile(jnp.array([[-1, 1, -1, 3, -1, -1]]), (4000, 1))
    filled = np.asarray(scenes.fill_open(jax.random.key(1), named))
    assert np.all(filled[:, 1] == 1) and np.all(filled[:, 3] == 3)
    for i in (0, 2, 4, 5):
        share = np.bincount(filled[:, i]) / len(filled)
        np.testing.assert_allclose(share, 1 / scenes.NUM_VALUES[i], atol=0.035)


def test_objects_neither_touch_nor_leave_the_picture(scene):
    centers, radius = np.asarray(scene.centers), np.asarray(scene.radius)[:, None]
    present = np.asarray(scene.present) > 0
    edge = np.minimum(centers, scenes.IMAGE_SIZE - centers).min(-1) - radius
    assert edge[present].min() > 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = present[:, i] & present[:, j]
        gap = np.linalg.norm(centers[:, i] - centers[:, j], axis=-1) - 2 * radius[:, 0]
        assert gap[both].min() > 2.0  # two outlines of 1 px


def test_sizes_do_not_overlap():
    small, large = scenes.RADII * np.array([[1 + scenes.RADIUS_JITTER], [1 - scenes.RADIUS_JITTER]])
    assert np.all(large > 1.18 * small)  # there is less room for three


def test_the_same_key_gives_the_same_scene(scene):
    again = scenes.sample_scene(jax.random.key(0), EVERYTHING_OPEN)
    for one, other in zip(jax.tree.leaves(scene), jax.tree.leaves(again)):
        np.testing.assert_array_equal(one, other)


def test_prompt_sets_are_disjoint_and_leave_colours_open():
    splits = scenes.prompt_splits()
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train_open": 96,
        "heldout_open": 96,
        "tuning_open": 48,
        "specified": 64,
    }
    leaving_open = splits["train_open"] + splits["heldout_open"] + splits["tuning_open"]
    assert len(set(leaving_open)) == len(leaving_open)
    for text in leaving_open:
        assert scenes.parse(text)[scenes.COLOR] == scenes.OPEN
    assert all((scenes.parse(text) >= 0).all() for text in splits["specified"])
