"""Colours by zero-shot classification: crops, sentences, and CLIP on torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pec_jax.host import colours, geneval
from pec_jax.host.geneval import CLASSES, COLOURS, Detection

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_a_crop_is_grey_outside_the_mask():
    mask = RNG.random((20, 30)) < 0.5
    found = colours.crop(IMAGE, Detection(0, 1.0, (3.0, 2.0, 9.0, 12.0), mask=mask))
    assert found.shape == (10, 6, 3) and found.dtype == np.uint8
    for y in range(10):
        for x in range(6):
            expected = IMAGE[y + 2, x + 3] if mask[y + 2, x + 3] else [0x99] * 3
            assert list(found[y, x]) == list(expected)


def test_without_a_mask_it_is_the_whole_box():
    found = colours.crop(IMAGE, Detection(0, 1.0, (2.6, 0.4, 9.5, 12.6)))
    np.testing.assert_array_equal(found, IMAGE[0:13, 3:10])


@pytest.mark.parametrize(
    "box, shape",
    [
        ((-1.0, -1.0, 31.0, 21.0), (20, 30)),
        ((5.0, 5.0, 5.0, 5.0), (1, 1)),
        ((30.0, 20.0, 31.0, 21.0), (1, 1)),
        ((4.4, 3.0, 4.45, 8.0), (5, 1)),
    ],
)
def test_every_box_has_a_pixel_of_the_image(box, shape):
    assert colours.crop(IMAGE, Detection(0, 1.0, box)).shape[:2] == shape


def test_squares_are_cut_out_of_the_centre():
    same = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(colours.square(same, 16), same)
    np.testing.assert_array_equal(colours.square(IMAGE, 20), IMAGE[:, 5:25])
    np.testing.assert_array_equal(
        colours.square(IMAGE[:, :20].transpose(1, 0, 2), 20).shape, (20, 20, 3)
    )
    # 35 x 20 makes 14 x 8; three on the left, three on the right.
    wide = RNG.integers(0, 256, (20, 35, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(wide).resize((14, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(colours.square(wide, 8), resized[:, 3:11])
    assert colours.square(np.zeros((1, 300, 3), np.uint8), 8).shape == (8, 8, 3)


def test_the_nearest_colour_wins():
    """Against loops over colours and sentences, with vectors drawn at random."""
    texts, seen = {}, []

    def text_features(sentences):
        seen.append(list(sentences))
        return np.stack([texts.setdefault(s, RNG.normal(size=8)) for s in sentences])

    def image_features(crops):
        return np.stack([crop.reshape(-1)[:8].astype(float) - 128 for crop in crops])

    classify = colours.zero_shot(image_features, text_features)
    crops = [RNG.integers(0, 256, (3, 3, 3), dtype=np.uint8) for _ in range(40)]
    names = ["cup", "wine glass"] * 20
    found = classify(crops, names)
    for crop, name, colour in zip(crops, names, found):
        cosines = []
        for c in COLOURS:
            sentences = (
                f"a photo of a {c} {name}",
                f"a photo of a {c}-colored {name}",
                f"a photo of a {c} object",
            )
            total = sum(texts[s] / np.linalg.norm(texts[s]) for s in sentences)
            cosines.append(image_features([crop])[0] @ total / np.linalg.norm(total))
        assert colour == COLOURS[int(np.argmax(cosines))]
    assert len(set(found)) > 5
    assert classify(crops, names) == found and len(seen) == 2  # a class is encoded once


def test_only_what_a_rule_looks_at_is_classified():
    asked = []

    def classify(crops, names):
        asked.extend((crop.shape[:2], name) for crop, name in zip(crops, names))
        return ["blue"] * len(crops)

    cup, dog = CLASSES.index("cup"), CLASSES.index("dog")
    boxes = [(0.0, 0.0, 2.0, 3.0), (0.0, 0.0, 4.0, 5.0), (0.0, 0.0, 6.0, 7.0)]
    named, *unnamed = [Detection(cup, 0.9 - i / 10, box) for i, box in enumerate(boxes)]
    named = dataclasses.replace(named, colour="red")
    found = {cup: [named, *unnamed], dog: [Detection(dog, 0.9, boxes[0])]}
    task = geneval.parse(
        {
            "tag": "color_attr",
            "include": [
                {"class": "cup", "count": 2, "color": "blue"},
                {"class": "dog", "count": 1},
            ],
        }
    )
    result = colours.name_colours(IMAGE, task, found, classify)
    assert asked == [((5, 4), "cup")]
    assert [d.colour for d in result[cup]] == ["red", "blue", None]
    assert result[dog] == found[dog] and found[cup][1].colour is None
    # With too few there is nothing to compare.
    few = {cup: [named]}
    assert colours.name_colours(IMAGE, task, few, classify) is few
