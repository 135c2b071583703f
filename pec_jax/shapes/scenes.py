"""The shapes world: procedural images of one object, with compositional captions.

A scene has five attributes; a caption names any subset of them and leaves the rest open
("a small circle on a dark background" leaves colour and position open). Attributes are int arrays
`[..., 5]` in the order of `ATTRIBUTES`, where -1 means open. Everything that makes images is pure
in its key and traceable, so that training data can be drawn inside a jitted step; captions are
host strings, tabulated by `caption_index`.
"""

from __future__ import annotations

import itertools
import math
import string

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
POSITIONS = ("left", "right", "top", "bottom", "center")
BACKGROUNDS = ("dark", "light")

ATTRIBUTES = ("shape", "color", "size", "position", "background")
VALUES = (SHAPES, COLORS, SIZES, POSITIONS, BACKGROUNDS)
NUM_VALUES = tuple(len(values) for values in VALUES)
NUM_CAPTIONS = math.prod(n + 1 for n in NUM_VALUES)
SHAPE, COLOR, SIZE, POSITION, BACKGROUND = range(5)
OPEN = -1

IMAGE_SIZE = 32
MARGIN = 1.0  # px that an object of extent `radius` keeps from the border
PALETTE = np.array(  # [8, 3] sRGB
    [
        (0.90, 0.10, 0.12),
        (1.00, 0.52, 0.05),
        (0.97, 0.90, 0.12),
        (0.13, 0.65, 0.20),
        (0.15, 0.82, 0.88),
        (0.13, 0.27, 0.90),
        (0.52, 0.15, 0.68),
        (1.00, 0.52, 0.76),
    ],
    np.float32,
)
BACKGROUND_LEVELS = np.array([0.10, 0.92], np.float32)
COLOR_JITTER = 0.05
BACKGROUND_JITTER = 0.05
RADIUS_RANGES = np.array([(4.0, 5.5), (8.0, 9.5)], np.float32)  # [size, (low, high)] px

# The dimensions of each shape in units of the radius. They look equally large to the eye, and
# nearly all fit a circle's room: equal areas would push the triangle's tip out of the image.
SQUARE_HALF = 0.886
TRIANGLE_CIRCUMRADIUS = 1.25
CROSS_LENGTH = 1.05
CROSS_WIDTH = 0.38
AREA_COEFFICIENTS = np.array(  # area = coefficient * radius^2
    [
        math.pi,
        4 * SQUARE_HALF**2,
        0.75 * math.sqrt(3) * TRIANGLE_CIRCUMRADIUS**2,
        8 * CROSS_LENGTH * CROSS_WIDTH - 4 * CROSS_WIDTH**2,
    ],
    np.float32,
)

# Of the offset from the image's centre, in units of the room there is: |u| in the centre, along the
# named direction, and across it.
CENTER_REACH = 0.3
EDGE_RANGE = (0.65, 1.0)
ACROSS_REACH = 0.4
_DIRECTIONS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)], np.float32)  # (x, y), y down

_POSITION_PHRASES = ("on the left", "on the right", "at the top", "at the bottom", "in the center")


@struct.dataclass
class Scene:
    """All that determines an image; positions and lengths in pixels of a 32-pixel image."""

    attributes: Array  # [N, 5] int32, none open
    radius: Array  # [N]
    center: Array  # [N, 2] (x, y), of the object's centroid, y pointing down
    color: Array  # [N, 3] of the object, in [0, 1]
    background: Array  # [N, 3] in [0, 1]


def room(radius: Array) -> Array:
    """How far a centroid may lie from the image's centre, px: 16 - radius - 1."""
    return IMAGE_SIZE / 2 - radius - MARGIN


def fill_open(key: Array, attributes: Array) -> Array:
    """Replaces every open attribute by a value drawn uniformly.

    Args:
      key: PRNG key.
      attributes: [N, 5] int, -1 = open.

    Returns:
      [N, 5] int32, none open.
    """
    attributes = jnp.asarray(attributes, jnp.int32)
    drawn = jax.random.randint(key, attributes.shape, 0, jnp.asarray(NUM_VALUES, jnp.int32))
    return jnp.where(attributes < 0, drawn, attributes)


def hide(key: Array, attributes: Array, probability: float | Array = 0.5) -> Array:
    """Opens each attribute independently with a probability: the captions to train on.

    Args:
      key: PRNG key.
      attributes: [N, 5] int.
      probability: of an attribute to be left open, in [0, 1]; one, or [N, 1].

    Returns:
      [N, 5] int32, with -1 where hidden.
    """
    hidden = jax.random.bernoulli(key, probability, attributes.shape)
    return jnp.where(hidden, OPEN, jnp.asarray(attributes, jnp.int32))


def sample_scene(key: Array, attributes: Array) -> Scene:
    """Draws a scene that fits the attributes; what they leave open is uniform.

    Args:
      key: PRNG key; the same key and attributes always give the same scene.
      attributes: [N, 5] int, -1 = open.

    Returns:
      A Scene of N objects.
    """
    keys = jax.random.split(key, 6)
    attributes = fill_open(keys[0], attributes)
    n = attributes.shape[0]
    low, high = jnp.moveaxis(jnp.asarray(RADIUS_RANGES)[attributes[:, SIZE]], -1, 0)
    radius = low + (high - low) * jax.random.uniform(keys[1], (n,))

    direction = jnp.asarray(_DIRECTIONS)[attributes[:, POSITION]]  # [N, 2]
    centered = attributes[:, POSITION, None] == POSITIONS.index("center")
    spread = jax.random.uniform(keys[2], (n, 2), minval=-1.0)
    along = jax.random.uniform(keys[3], (n, 1), minval=EDGE_RANGE[0], maxval=EDGE_RANGE[1])
    beside = spread * jnp.where(centered, CENTER_REACH, ACROSS_REACH)
    offset = jnp.where(direction != 0, direction * along, beside)
    center = IMAGE_SIZE / 2 + offset * room(radius)[:, None]

    color = jnp.asarray(PALETTE)[attributes[:, COLOR]]
    color += jax.random.uniform(keys[4], (n, 3), minval=-COLOR_JITTER, maxval=COLOR_JITTER)
    level = jnp.asarray(BACKGROUND_LEVELS)[attributes[:, BACKGROUND], None]
    tint = jax.random.uniform(keys[5], (n, 3), minval=-BACKGROUND_JITTER, maxval=BACKGROUND_JITTER)
    return Scene(
        attributes=attributes,
        radius=radius,
        center=center,
        color=jnp.clip(color, 0.0, 1.0),
        background=jnp.clip(level + tint, 0.0, 1.0),
    )


def _box_distance(x: Array, y: Array, half_x: Array, half_y: Array) -> Array:
    """Signed distance to an axis-aligned box around the origin."""
    dx, dy = jnp.abs(x) - half_x, jnp.abs(y) - half_y
    outside = jnp.sqrt(jnp.maximum(dx, 0.0) ** 2 + jnp.maximum(dy, 0.0) ** 2)
    return outside + jnp.minimum(jnp.maximum(dx, dy), 0.0)


def shape_distances(center: Array, radius: Array, size: int = IMAGE_SIZE) -> Array:
    """Signed distances of every pixel's centre to each of the four shapes, px, negative inside.

    Args:
      center: [..., 2] centroid (x, y), px.
      radius: [..., 4] px, of each shape.
      size: height and width of the grid, px.

    Returns:
      [..., 4, size, size] in the order of `SHAPES`.
    """
    grid = jnp.arange(size) + 0.5
    x = grid[None, :] - center[..., 0, None, None]  # [..., 1, size]
    y = grid[:, None] - center[..., 1, None, None]  # [..., size, 1]
    r_circle, r_square, r_triangle, r_cross = jnp.moveaxis(radius[..., None, None], -3, 0)
    circle = jnp.sqrt(x**2 + y**2) - r_circle
    square = _box_distance(x, y, SQUARE_HALF * r_square, SQUARE_HALF * r_square)
    # Three half-planes, each half a circumradius from the centroid; the tip points up.
    inradius = 0.5 * TRIANGLE_CIRCUMRADIUS * r_triangle
    slope = 0.5 * math.sqrt(3) * jnp.abs(x) - 0.5 * y
    triangle = jnp.maximum(y, slope) - inradius
    length, width = CROSS_LENGTH * r_cross, CROSS_WIDTH * r_cross
    cross = jnp.minimum(_box_distance(x, y, length, width), _box_distance(x, y, width, length))
    return jnp.stack([circle, square, triangle, cross], axis=-3)


def coverage(distance: Array) -> Array:
    """How much of a pixel an edge at this signed distance covers, in [0, 1] (anti-aliasing)."""
    return jnp.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene) -> Array:
    """Draws scenes, anti-aliased by signed distances.

    Args:
      scene: N scenes.

    Returns:
      [N, 32, 32, 3] fp32 in [0, 1].
    """
    radius = jnp.repeat(scene.radius[:, None], len(SHAPES), axis=1)
    distances = shape_distances(scene.center, radius)  # [N, 4, 32, 32]
    index = scene.attributes[:, SHAPE, None, None, None]
    alpha = coverage(jnp.take_along_axis(distances, index, axis=1))[:, 0, :, :, None]
    return alpha * scene.color[:, None, None] + (1.0 - alpha) * scene.background[:, None, None]


def caption(attributes) -> str:
    """The caption that names what is not open, e.g. "a small red circle at the top".

    Args:
      attributes: [5] ints, -1 = open.

    Returns:
      At most 11 words, lower case, without a full stop.
    """
    shape, color, size, position, background = (int(a) for a in attributes)
    words = []
    if size >= 0:
        words.append(SIZES[size])
    if color >= 0:
        words.append(COLORS[color])
    words.append(SHAPES[shape] if shape >= 0 else "shape")
    words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    if position >= 0:
        words.append(_POSITION_PHRASES[position])
    if background >= 0:
        words.append(f"on a {BACKGROUNDS[background]} background")
    return " ".join(words)


def parse(text: str) -> np.ndarray:
    """The attributes that a text names; the inverse of `caption` on its captions.

    Args:
      text: any text; words that name no attribute are ignored.

    Returns:
      [5] int32, -1 where nothing is named (the first mention counts).
    """
    attributes = np.full(5, OPEN, np.int32)
    for word in text.lower().replace("centre", "center").split():
        word = word.strip(string.punctuation)
        for i, values in enumerate(VALUES):
            if word in values and attributes[i] == OPEN:
                attributes[i] = values.index(word)
    return attributes


def all_attributes() -> np.ndarray:
    """Every combination of named and open attributes, [2430, 5] int32, by `caption_index`."""
    ranges = [range(OPEN, n) for n in NUM_VALUES]
    return np.array(list(itertools.product(*ranges)), np.int32)


def all_captions() -> list[str]:
    """The captions of `all_attributes`, so that embeddings can be tabulated."""
    return [caption(attributes) for attributes in all_attributes()]


def caption_index(attributes: Array) -> Array:
    """The place of a caption in `all_captions`; traceable.

    Args:
      attributes: [..., 5] int, -1 = open.

    Returns:
      [...] int32 in [0, 2430).
    """
    index = jnp.zeros(jnp.shape(attributes)[:-1], jnp.int32)
    for i, n in enumerate(NUM_VALUES):
        index = index * (n + 1) + attributes[..., i] + 1
    return index


def prompt_splits(seed: int = 0) -> dict[str, list[str]]:
    """The prompt sets that come with the package, by file name without its ending.

    `train_open` and `heldout_open` halve the 190 captions that leave the colour and at least one
    more attribute open; `specified` holds 64 captions that leave nothing open.

    Args:
      seed: of the shuffles.

    Returns:
      Name to captions; the first two are disjoint.
    """
    rng = np.random.default_rng(seed)
    attributes = all_attributes()
    num_open = (attributes == OPEN).sum(-1)
    open_color = attributes[(attributes[:, COLOR] == OPEN) & (num_open >= 2)]
    open_color = rng.permutation(open_color)
    specified = rng.permutation(attributes[num_open == 0])[:64]
    half = len(open_color) // 2
    splits = {
        "train_open": open_color[:half],
        "heldout_open": open_color[half:],
        "specified": specified,
    }
    return {name: [caption(a) for a in rows] for name, rows in splits.items()}
