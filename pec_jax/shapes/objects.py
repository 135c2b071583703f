"""The objects of the shapes world: six kinds, each a few layers of signed distances.

Everything is in the object's own coordinates: its centre is the origin, its radius 1, y points
down. An object is drawn from back to front: the silhouette widened by an outline, then its layers.
A layer is a distance field and a paint.

Distances of ellipse, star and heart: Inigo Quilez, "2D distance functions",
https://iquilezles.org/articles/distfunctions2d/.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("fish", "cat", "house", "star", "heart", "mushroom")
LAYERS = 4
OUTLINE = 1.0  # px, around the silhouette
OUTLINE_COLOR = np.array([0.10, 0.08, 0.12], np.float32)
NOWHERE = 9.0  # a distance that is outside of every object

# A layer's colour is share * (the object's colour) + constant.
_BODY, _SHADE = (1.0, 0.0, 0.0, 0.0), (0.55, 0.0, 0.0, 0.0)
_CREAM, _INK = (0.0, 0.99, 0.93, 0.80), (0.0, *OUTLINE_COLOR.tolist())
_STEM = (0.0, 0.60, 0.46, 0.42)  # unlike every background, so that a silhouette has no hole
_ROOF = (0.0, 0.40, 0.14, 0.08)
_NONE = (0.0, 0.0, 0.0, 0.0)
PAINTS = np.array(  # [6, LAYERS, 4]
    [
        (_BODY, _SHADE, _CREAM, _INK),  # fish: body and tail, fin, eye, pupil
        (_BODY, _CREAM, _INK, _INK),  # cat: head and ears, muzzle, eyes, nose
        (_BODY, _ROOF, _INK, _CREAM),  # house: walls, roof, door, window
        (_BODY, _NONE, _NONE, _NONE),
        (_BODY, _NONE, _NONE, _NONE),
        (_STEM, _BODY, _CREAM, _NONE),  # mushroom: stem, cap, dots
    ],
    np.float32,
)


def _circle(x, y, at, radius):
    return jnp.sqrt((x - at[0]) ** 2 + (y - at[1]) ** 2) - radius


def _ellipse(x, y, at, a, b):
    """First-order distance: k0 (k0 - 1) / k1 with k0 = |p / ab| and k1 = |p / ab^2|."""
    x, y = x - at[0], y - at[1]
    k0 = jnp.sqrt((x / a) ** 2 + (y / b) ** 2)
    k1 = jnp.sqrt((x / a**2) ** 2 + (y / b**2) ** 2)
    return k0 * (k0 - 1.0) / jnp.maximum(k1, 1e-6)


def _box(x, y, at, half_x, half_y):
    dx, dy = jnp.abs(x - at[0]) - half_x, jnp.abs(y - at[1]) - half_y
    outside = jnp.sqrt(jnp.maximum(dx, 0.0) ** 2 + jnp.maximum(dy, 0.0) ** 2)
    return outside + jnp.minimum(jnp.maximum(dx, dy), 0.0)


def _polygon(x, y, *corners):
    """A convex polygon, as the largest of its half-planes; corners clockwise as seen."""
    sides = []
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0])):
        length = math.hypot(bx - ax, by - ay)
        sides.append(((x - ax) * (by - ay) - (y - ay) * (bx - ax)) / length)
    return jnp.max(jnp.stack(sides), axis=0)


def _star(x, y, radius, sharpness):
    """A star of five points, the first one up."""
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = jnp.abs(x), -y
    for kx, ky in ((cos, -sin), (-cos, -sin)):
        beyond = 2.0 * jnp.maximum(kx * x + ky * y, 0.0)
        x, y = x - beyond * kx, y - beyond * ky
    x, y = jnp.abs(x), y - radius
    bx, by = sharpness * sin, sharpness * cos - 1.0
    along = jnp.clip((x * bx + y * by) / (bx**2 + by**2), 0.0, radius)
    return jnp.sqrt((x - bx * along) ** 2 + (y - by * along) ** 2) * jnp.sign(y * bx - x * by)


def _heart(x, y, scale):
    """A heart whose tip points down, about 1.2 high and wide before scaling."""
    x, y = jnp.abs(x) / scale, 0.55 - y / scale
    lobe = jnp.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(2) / 4
    onto = 0.5 * jnp.maximum(x + y, 0.0)
    low = jnp.minimum(x**2 + (y - 1.0) ** 2, (x - onto) ** 2 + (y - onto) ** 2)
    return scale * jnp.where(x + y > 1.0, lobe, jnp.sqrt(low) * jnp.sign(x - y))


def _fish(x, y):
    tail = jnp.minimum(
        _polygon(x, y, (0.36, 0.0), (0.96, -0.58), (0.82, 0.0)),
        _polygon(x, y, (0.36, 0.0), (0.82, 0.0), (0.96, 0.58)),
    )
    body = jnp.minimum(_ellipse(x, y, (-0.20, 0.0), 0.78, 0.56), tail)
    fin = _polygon(x, y, (-0.05, 0.02), (0.28, -0.02), (0.16, 0.28))
    eye = _circle(x, y, (-0.58, -0.12), 0.17)
    return body, [body, fin, eye, _circle(x, y, (-0.60, -0.12), 0.09)]


def _cat(x, y):
    ears = _polygon(jnp.abs(x), y, (0.10, -0.35), (0.72, -0.98), (0.80, -0.05))
    head = jnp.minimum(_ellipse(x, y, (0.0, 0.18), 0.90, 0.74), ears)
    eyes = _ellipse(jnp.abs(x), y, (0.36, 0.08), 0.12, 0.17)
    nose = _polygon(x, y, (-0.12, 0.36), (0.12, 0.36), (0.0, 0.50))
    return head, [head, _ellipse(x, y, (0.0, 0.50), 0.34, 0.24), eyes, nose]


def _house(x, y):
    walls = _box(x, y, (0.0, 0.42), 0.66, 0.48)
    roof = _polygon(x, y, (-0.90, -0.06), (0.0, -0.98), (0.90, -0.06))
    door = _box(x, y, (-0.28, 0.62), 0.17, 0.28)
    return jnp.minimum(walls, roof), [walls, roof, door, _box(x, y, (0.30, 0.36), 0.19, 0.17)]


def _mushroom(x, y):
    cap = jnp.maximum(_ellipse(x, y, (0.0, 0.12), 1.0, 1.02), y - 0.12)
    stem = _box(x, y, (0.0, 0.50), 0.30, 0.42)
    dots = jnp.minimum(
        _ellipse(jnp.abs(x), y, (0.52, -0.18), 0.15, 0.14), _circle(x, y, (0.0, -0.50), 0.18)
    )
    return jnp.minimum(cap, stem), [stem, cap, dots]


def _plain_star(x, y):
    distance = _star(x, y, 1.06, 0.50)
    return distance, [distance]


def _plain_heart(x, y):
    distance = _heart(x, y, 1.62)
    return distance, [distance]


_DRAWN = (_fish, _cat, _house, _plain_star, _plain_heart, _mushroom)  # in the order of KINDS


def silhouette(kind: int, x: Float[Array, "*n"], y: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Signed distance to the silhouette of one kind, in units of the radius, negative inside."""
    return _DRAWN[kind](x, y)[0]


def distances(
    x: Float[Array, "*n"], y: Float[Array, "*n"]
) -> tuple[Float[Array, "*n 6"], Float[Array, "*n 6 4"]]:
    """Signed distances to every kind: to its silhouette, and to each of its layers.

    Args:
      x: across, in units of the radius.
      y: down, likewise.

    Returns:
      Silhouettes and layers in the order of `KINDS`, in units of the radius, negative inside.
    """
    kinds = [draw(x, y) for draw in _DRAWN]
    nowhere = jnp.full_like(x, NOWHERE)
    layers = [jnp.stack(found + [nowhere] * (LAYERS - len(found)), -1) for _, found in kinds]
    return jnp.stack([outer for outer, _ in kinds], -1), jnp.stack(layers, -2)


def coverage(distance: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """How much of a pixel an edge at a signed distance in px covers, in [0, 1] (anti-aliasing)."""
    return jnp.clip(0.5 - distance, 0.0, 1.0)
