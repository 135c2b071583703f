from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pec_jax
from pec_jax.shapes import scenes as shapes

ALL_OPEN = jnp.full((512, 5), shapes.OPEN)


sample_scene = jax.jit(shapes.sample_scene)
render = jax.jit(shapes.render)


@pytest.fixture(scope="module")
def scene():
    return sample_scene(jax.random.key(0), ALL_OPEN)


def test_caption_and_parse_are_inverse_on_all_2430_captions():
    attributes, captions = shapes.all_attributes(), shapes.all_captions()
    assert len(captions) == len(set(captions)) == shapes.NUM_CAPTIONS == 2430
    assert max(len(caption.split()) for caption in captions) == 11
    for row, caption in zip(attributes, captions):
        np.testing.assert_array_equal(shapes.parse(caption), row, err_msg=caption)


def test_caption_index_numbers_the_table():
    attributes = shapes.all_attributes()
    np.testing.assert_array_equal(jax.jit(shapes.caption_index)(attributes), np.arange(2430))


@pytest.mark.parametrize(
    ("attributes", "caption"),
    [
        ((-1, -1, -1, -1, -1), "a shape"),
        ((0, 0, 0, 2, 0), "a small red circle at the top on a dark background"),
        ((3, 1, -1, -1, -1), "an orange cross"),
        ((-1, -1, 1, 4, 1), "a large shape in the center on a light background"),
    ],
)
def test_captions_read_well(attributes, caption):
    assert shapes.caption(attributes) == caption


def test_parse_takes_what_it_finds_in_foreign_text():
    np.testing.assert_array_equal(
        shapes.parse("Two BLUE dogs, left of a square."), [1, 5, -1, 0, -1]
    )
    np.testing.assert_array_equal(shapes.parse("a photo of a bench"), [-1] * 5)
    np.testing.assert_array_equal(shapes.parse(""), [-1] * 5)
    np.testing.assert_array_equal(shapes.parse("red then blue"), [-1, 0, -1, -1, -1])


def test_scene_keeps_what_is_named_and_fills_the_rest_uniformly():
    named = jnp.tile(jnp.array([2, -1, 1, -1, -1]), (4096, 1))
    attributes = np.asarray(sample_scene(jax.random.key(1), named).attributes)
    assert (attributes[:, 0] == 2).all() and (attributes[:, 2] == 1).all()
    for i in (1, 3, 4):
        share = np.bincount(attributes[:, i], minlength=shapes.NUM_VALUES[i]) / len(attributes)
        np.testing.assert_allclose(share, 1 / shapes.NUM_VALUES[i], atol=0.03)


def test_scene_is_pure_in_its_key(scene):
    again = sample_scene(jax.random.key(0), ALL_OPEN)
    jax.tree.map(np.testing.assert_array_equal, scene, again)
    other = sample_scene(jax.random.key(1), ALL_OPEN)
    assert not np.array_equal(scene.center, other.center)


def test_scene_respects_the_ranges(scene):
    attributes = np.asarray(scene.attributes)
    radius = np.asarray(scene.radius)
    large = attributes[:, shapes.SIZE] == 1
    assert radius[~large].min() >= 4.0 and radius[~large].max() <= 5.5
    assert radius[large].min() >= 8.0 and radius[large].max() <= 9.5

    offset = (np.asarray(scene.center) - 16) / shapes.room(radius)[:, None]
    for position, (axis, sign) in enumerate([(0, -1), (0, 1), (1, -1), (1, 1)]):
        along, across = offset[attributes[:, shapes.POSITION] == position][:, [axis, 1 - axis]].T
        assert (sign * along >= 0.649).all() and (sign * along <= 1.001).all()
        assert (np.abs(across) <= 0.401).all()
    assert (np.abs(offset[attributes[:, shapes.POSITION] == 4]) <= 0.301).all()


def test_rendered_area_and_centroid_are_those_of_the_scene(scene):
    """The area comes from the formula, not from the renderer: the dimensions are consistent."""
    white = scene.replace(color=jnp.ones((512, 3)), background=jnp.zeros((512, 3)))
    mask = np.asarray(render(white))[..., 0]
    area = mask.sum((1, 2))
    shape = np.asarray(scene.attributes)[:, shapes.SHAPE]
    expected = shapes.AREA_COEFFICIENTS[shape] * np.asarray(scene.radius) ** 2
    np.testing.assert_allclose(area, expected, rtol=0.06)
    grid = np.arange(32) + 0.5
    center = np.stack([(mask * grid).sum((1, 2)), (mask * grid[:, None]).sum((1, 2))], -1)
    np.testing.assert_allclose(center / area[:, None], scene.center, atol=0.25)


def test_image_shows_the_colors_and_soft_edges(scene):
    images = np.asarray(render(scene))
    assert images.shape == (512, 32, 32, 3) and images.dtype == np.float32
    assert images.min() >= 0.0 and images.max() <= 1.0
    x, y = np.asarray(scene.center).astype(int).T
    np.testing.assert_allclose(images[np.arange(512), y, x], scene.color, atol=1e-6)
    corner = np.abs(images[:, -1, -1] - np.asarray(scene.background)).max(-1)
    assert (corner < 1e-6).mean() > 0.99
    share = (images - np.asarray(scene.background)[:, None, None])[..., 0]
    share = share / (np.asarray(scene.color) - np.asarray(scene.background))[:, None, None, 0]
    circles = np.asarray(scene.attributes)[:, shapes.SHAPE] == 0
    assert (((share > 0.1) & (share < 0.9)).sum((1, 2))[circles] >= 8).all()


def test_palette_is_well_separated_even_when_jittered():
    greys = np.repeat(shapes.BACKGROUND_LEVELS[:, None], 3, axis=1)
    colors = np.concatenate([shapes.PALETTE, greys])
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
    distance[np.diag_indices(len(colors))] = np.inf
    # However both are jittered, a colour stays nearest to its own palette entry.
    assert distance.min() > 2 * np.sqrt(3) * max(shapes.COLOR_JITTER, shapes.BACKGROUND_JITTER)
    assert distance.min() > 0.38


def test_hide_opens_the_given_share():
    attributes = shapes.fill_open(jax.random.key(0), ALL_OPEN)
    hidden = np.asarray(shapes.hide(jax.random.key(1), attributes, 0.25))
    assert np.mean(hidden == shapes.OPEN) == pytest.approx(0.25, abs=0.03)
    assert (hidden == np.asarray(attributes))[hidden != shapes.OPEN].all()
    np.testing.assert_array_equal(shapes.hide(jax.random.key(1), attributes, 0.0), attributes)


def test_prompt_splits_are_what_the_package_ships():
    splits = shapes.prompt_splits()
    directory = Path(pec_jax.__file__).parent / "shapes" / "assets" / "prompts"
    for name, prompts in splits.items():
        assert (directory / f"{name}.txt").read_text("utf-8").splitlines() == prompts
    assert len(splits["train_open"]) == len(splits["heldout_open"]) == 95
    assert not set(splits["train_open"]) & set(splits["heldout_open"])
    for prompt in splits["train_open"] + splits["heldout_open"]:
        attributes = shapes.parse(prompt)
        assert attributes[shapes.COLOR] == shapes.OPEN
        assert (attributes == shapes.OPEN).sum() >= 2
    assert len(set(splits["specified"])) == 64
    assert all((shapes.parse(prompt) >= 0).all() for prompt in splits["specified"])
