"""The scenes of the shapes world: one to three objects of a kind before a horizon, and captions.

A scene has six attributes; a caption names any subset of them and leaves the rest open ("two red
fish in the snow" leaves size and place open). Attributes are int arrays `[..., 6]` in the order of
`ATTRIBUTES`, where -1 means open. Everything that makes scenes is pure in its key and traceable, so
that training data can be drawn inside a jitted step; captions are host strings, tabulated by
`caption_index`. `render` makes images of scenes, with a finish that no caption names (`finish`).
"""

from __future__ import annotations

import itertools
import math
import string

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from pec_jax.shapes.objects import KINDS

NUMBERS = ("one", "two", "three")
SIZES = ("small", "large")
COLORS = ("red", "orange", "yellow", "blue", "purple", "pink")
PLACES = ("left", "right", "top", "bottom", "middle")
BACKGROUNDS = ("meadow", "desert", "snow", "sunset")

ATTRIBUTES = ("number", "size", "color", "kind", "place", "background")
VALUES = (NUMBERS, SIZES, COLORS, KINDS, PLACES, BACKGROUNDS)
NUM_VALUES = tuple(len(values) for values in VALUES)
NUM_SCENES = math.prod(NUM_VALUES)
NUM_CAPTIONS = math.prod(n + 1 for n in NUM_VALUES)
NUMBER, SIZE, COLOR, KIND, PLACE, BACKGROUND = range(6)
OPEN = -1

IMAGE_SIZE = 64
CENTER = IMAGE_SIZE / 2
MAX_OBJECTS = 3
PALETTE = np.array(  # [6, 3] sRGB
    [
        (0.86, 0.11, 0.14),
        (0.99, 0.53, 0.06),
        (0.99, 0.90, 0.16),
        (0.12, 0.34, 0.90),
        (0.54, 0.17, 0.70),
        (1.00, 0.52, 0.76),
    ],
    np.float32,
)
SKIES = np.array(  # [4, 3]
    [(0.60, 0.83, 0.97), (0.99, 0.94, 0.76), (0.72, 0.79, 0.87), (1.00, 0.66, 0.50)], np.float32
)
GROUNDS = np.array(
    [(0.45, 0.73, 0.34), (0.86, 0.66, 0.42), (0.96, 0.97, 0.99), (0.30, 0.42, 0.62)], np.float32
)
COLOR_JITTER = 0.04  # of an object
BACKGROUND_JITTER = 0.015  # of sky and ground

# Radius in px by size and number: fewer objects have more room.
RADII = np.array([(10.0, 9.0, 7.0), (14.5, 12.2, 8.5)], np.float32)  # [size, number]
RADIUS_JITTER = 0.01
SPACING = (0.0, 15.0, 21.8)  # px from the middle object, or half of two objects' distance
STRIP = 15.5  # px between the image's centre and the line of objects, unless in the middle
JITTER = 0.3  # px, of each object
SLIDE = (0.5, 0.3, 0.0)  # px along the line, by number: what there is room for
HORIZON, HORIZON_JITTER = 40.0, 1.0
_DIRECTIONS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)], np.float32)  # (x, y)

_PLACE_PHRASES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
_BACKGROUND_PHRASES = ("on a meadow", "in the desert", "in the snow", "at sunset")
_PLURALS = {"fish": "fish", "cat": "cats", "house": "houses", "star": "stars"}
_PLURALS |= {"heart": "hearts", "mushroom": "mushrooms", "thing": "things"}


@struct.dataclass
class Scene:
    """All that determines a picture but its finish; lengths in px of a 64-pixel image."""

    attributes: Array  # [N, 6] none open
    radius: Array  # [N]
    centers: Array  # [N, 3, 2] (x, y), y down
    present: Array  # [N, 3] 1 for an object that is there, else 0
    color: Array  # [N, 3] of the objects, in [0, 1]
    sky: Array  # [N, 3]
    ground: Array  # [N, 3]
    horizon: Array  # [N] px from the top


def fill_open(key: Array, attributes: Int[Array, "*n 6"]) -> Int[Array, "*n 6"]:
    """Replaces every open attribute by a value drawn uniformly.

    Args:
      key: PRNG key.
      attributes: -1 = open.

    Returns:
      None open.
    """
    attributes = jnp.asarray(attributes, jnp.int32)
    drawn = jax.random.randint(key, attributes.shape, 0, jnp.asarray(NUM_VALUES, jnp.int32))
    return jnp.where(attributes < 0, drawn, attributes)


def hide(
    key: Array, attributes: Int[Array, "*n 6"], probability: float | Array = 0.5
) -> Int[Array, "*n 6"]:
    """Opens each attribute independently with a probability: the captions to train on.

    Args:
      key: PRNG key.
      attributes: -1 = open.
      probability: of an attribute to be left open, in [0, 1]; one, or [N, 1].

    Returns:
      With -1 where hidden.
    """
    hidden = jax.random.bernoulli(key, probability, attributes.shape)
    return jnp.where(hidden, OPEN, jnp.asarray(attributes, jnp.int32))


def _uniform(key: Array, shape: tuple[int, ...], reach: float | Array) -> Array:
    return reach * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _centers(key: Array, attributes: Array) -> Array:
    """Objects in a line: a column on the left or right, a row at the top, bottom or middle."""
    line_key, jitter_key = jax.random.split(key)
    n, number, place = attributes.shape[0], attributes[:, NUMBER], attributes[:, PLACE]
    spacing = jnp.asarray(SPACING)[number]
    slots = jnp.asarray([(0.0, 0.0, 0.0), (-1.0, 1.0, 0.0), (-1.0, 0.0, 1.0)])[number]  # [N, 3]
    along = slots * spacing[:, None] + _uniform(line_key, (n, 1), jnp.asarray(SLIDE)[number, None])
    column = place < PLACES.index("top")
    direction = jnp.where(column[:, None], jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]))
    start = CENTER + STRIP * jnp.asarray(_DIRECTIONS)[place]  # [N, 2]
    centers = start[:, None] + along[..., None] * direction[:, None]
    return centers + _uniform(jitter_key, centers.shape, JITTER)


def sample_scene(key: Array, attributes: Int[Array, "n 6"]) -> Scene:
    """Draws scenes that fit the attributes; what they leave open is uniform.

    Args:
      key: PRNG key; the same key and attributes always give the same scenes.
      attributes: -1 = open.

    Returns:
      N scenes.
    """
    keys = jax.random.split(key, 7)
    attributes = fill_open(keys[0], attributes)
    n, number = attributes.shape[0], attributes[:, NUMBER]
    background = attributes[:, BACKGROUND]
    radius = jnp.asarray(RADII)[attributes[:, SIZE], number]
    tint = lambda k, colors, reach: jnp.clip(colors + _uniform(k, (n, 3), reach), 0.0, 1.0)  # noqa: E731
    return Scene(
        attributes=attributes,
        radius=radius * (1.0 + _uniform(keys[1], (n,), RADIUS_JITTER)),
        centers=_centers(keys[2], attributes),
        present=(jnp.arange(MAX_OBJECTS) <= number[:, None]).astype(jnp.float32),
        color=tint(keys[3], jnp.asarray(PALETTE)[attributes[:, COLOR]], COLOR_JITTER),
        sky=tint(keys[4], jnp.asarray(SKIES)[background], BACKGROUND_JITTER),
        ground=tint(keys[5], jnp.asarray(GROUNDS)[background], BACKGROUND_JITTER),
        horizon=HORIZON + _uniform(keys[6], (n,), HORIZON_JITTER),
    )


def caption(attributes) -> str:
    """The caption that names what is not open, e.g. "two small red fish at the top".

    Args:
      attributes: [6] ints, -1 = open.

    Returns:
      At most 10 words, lower case, without a full stop.
    """
    number, size, color, kind, place, background = (int(a) for a in attributes)
    noun = KINDS[kind] if kind >= 0 else "thing"
    words = [SIZES[size]] if size >= 0 else []
    words += [COLORS[color]] if color >= 0 else []
    words += [noun if number == 0 else _PLURALS[noun]]
    if number == 0:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    else:
        words.insert(0, NUMBERS[number] if number > 0 else "some")
    if place >= 0:
        words.append(_PLACE_PHRASES[place])
    if background >= 0:
        words.append(_BACKGROUND_PHRASES[background])
    return " ".join(words)


def parse(text: str) -> np.ndarray:
    """The attributes that a text names; the inverse of `caption` on its captions.

    Args:
      text: any text; words that name no attribute are ignored.

    Returns:
      [6] int32, -1 where nothing is named (the first mention counts).
    """
    attributes = np.full(len(ATTRIBUTES), OPEN, np.int32)
    singular = {plural: kind for kind, plural in _PLURALS.items()}
    words = [word.strip(string.punctuation) for word in text.lower().split()]
    words = [{"center": "middle", "centre": "middle"}.get(w, singular.get(w, w)) for w in words]
    if words and words[0] in ("a", "an"):
        attributes[NUMBER] = 0
    for word in words:
        for i, values in enumerate(VALUES):
            if word in values and attributes[i] == OPEN:
                attributes[i] = values.index(word)
    return attributes


def all_attributes() -> np.ndarray:
    """Every combination of named and open attributes, [17640, 6] int32, by `caption_index`."""
    ranges = [range(OPEN, n) for n in NUM_VALUES]
    return np.array(list(itertools.product(*ranges)), np.int32)


def all_captions() -> list[str]:
    """The captions of `all_attributes`, so that embeddings can be tabulated."""
    return [caption(attributes) for attributes in all_attributes()]


def caption_index(attributes: Int[Array, "*n 6"]) -> Int[Array, "*n"]:
    """The place of a caption in `all_captions`; traceable.

    Args:
      attributes: -1 = open.

    Returns:
      int32 in [0, NUM_CAPTIONS).
    """
    index = jnp.zeros(jnp.shape(attributes)[:-1], jnp.int32)
    for i, n in enumerate(NUM_VALUES):
        index = index * (n + 1) + attributes[..., i] + 1
    return index


def prompt_splits(seed: int = 0) -> dict[str, list[str]]:
    """The prompt sets that come with the package, by file name without its ending.

    `train_open` and `heldout_open` are 96 captions each of those that leave the colour and two to
    four more attributes open, and `tuning_open` 48 more, to choose parameters on; `specified` holds
    64 captions that leave nothing open.

    Args:
      seed: of the shuffles.

    Returns:
      Name to captions; those that leave something open are disjoint.
    """
    rng = np.random.default_rng(seed)
    attributes = all_attributes()
    num_open = (attributes == OPEN).sum(-1)
    open_color = attributes[(attributes[:, COLOR] == OPEN) & (num_open >= 3) & (num_open <= 5)]
    open_color = rng.permutation(open_color)
    splits = {
        "train_open": open_color[:96],
        "heldout_open": open_color[96:192],
        "tuning_open": open_color[192:240],
        "specified": rng.permutation(attributes[num_open == 0])[:64],
    }
    return {name: [caption(a) for a in rows] for name, rows in splits.items()}
