"""A rule-based judge for the shapes world: finds the object and checks what the prompt names.

The rules use no learned weights: background from the border, the object as what differs from it,
its colour, size and place by moments, and its shape by overlap with ideal masks. All of it runs in
the graph. It plays the part that GenEval (Ghosh et al. 2023, arXiv 2310.11513) plays for photos.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pec_jax.shapes import scenes as shapes

MIN_CONTRAST = 0.2  # RGB distance to the background; palette colours keep 0.35 from either
MIN_AREA = 16.0  # px of 32 x 32; the smallest object has 32
MAX_AREA = 500.0  # px; the largest has 284
MIN_OVERLAP = 0.6  # IoU with the best ideal mask, below which there is no object but clutter
EDGE_GAIN = 1.6  # steepening of a pixel's share about 1/2, which silences faint noise
CLUTTER_GAIN = 3.0  # the same where the sign of the noise is lost, so that it would add up
RADIUS_BOUNDARY = 6.65  # px, geometric middle of the largest small and the smallest large radius
POSITION_BOUNDARY = 0.475  # middle of the reach of "center" and the nearest "left"


@struct.dataclass
class Detected:
    """What was found in N images; positions and lengths in px of a 32-pixel image."""

    attributes: Array  # [N, 5] int32, in the order of shapes.ATTRIBUTES
    found: Array  # [N] bool: there is one object; otherwise the other fields mean little
    color: Array  # [N, 3] mean colour of the object
    background: Array  # [N, 3]
    center: Array  # [N, 2] centroid (x, y)
    radius: Array  # [N]
    overlap: Array  # [N] IoU of all that stands out with the ideal mask, in [0, 1]


def _background(images: Array) -> Array:
    """Median colour of the border pixels [N, 3]: an object may cover some of them, not half."""
    n = images.shape[0]
    rows = images[:, (0, -1)].reshape(n, -1, 3)
    columns = images[:, 1:-1, (0, -1)].reshape(n, -1, 3)
    return jnp.median(jnp.concatenate([rows, columns], axis=1), axis=1)


def _object_color(images: Array, contrast: Array) -> Array:
    """Mean colour [N, 3] of the pixels that differ clearly: edges are mixed with background."""
    top = jnp.max(contrast, axis=(1, 2), keepdims=True)
    inside = (contrast > jnp.maximum(0.7 * top, MIN_CONTRAST)).astype(jnp.float32)[..., None]
    return jnp.sum(images * inside, axis=(1, 2)) / jnp.maximum(jnp.sum(inside, axis=(1, 2)), 1.0)


def _steepen(share: Array, gain: float) -> Array:
    """Clips a pixel's share of the object to [0, 1] so that faint noise becomes nothing."""
    return jnp.clip(gain * (share - 0.5) + 0.5, 0.0, 1.0)


def _soft_mask(images: Array, background: Array, color: Array) -> Array:
    """Share of the object in each pixel [N, 32, 32], by projecting on background -> colour."""
    axis = (color - background)[:, None, None]
    share = jnp.sum((images - background[:, None, None]) * axis, axis=-1)
    return _steepen(share / jnp.maximum(jnp.sum(axis**2, axis=-1), 1e-6), EDGE_GAIN)


def _overlaps(mask: Array, ideal: Array) -> Array:
    """IoU [N, 4] of a mask [N, 32, 32] with the ideal masks [N, 4, 32, 32]."""
    mask = mask[:, None]
    union = jnp.maximum(jnp.sum(jnp.maximum(mask, ideal), axis=(2, 3)), 1e-6)
    return jnp.sum(jnp.minimum(mask, ideal), axis=(2, 3)) / union


def _position(center: Array, radius: Array) -> Array:
    """Index [N] into POSITIONS, from the centroid's offset in units of the room there is."""
    offset = (center - shapes.IMAGE_SIZE / 2) / jnp.maximum(shapes.room(radius), 1.0)[:, None]
    horizontal = jnp.abs(offset[:, 0]) >= jnp.abs(offset[:, 1])
    sideways = jnp.where(offset[:, 0] < 0, 0, 1)
    upright = jnp.where(offset[:, 1] < 0, 2, 3)
    away = jnp.max(jnp.abs(offset), axis=-1) > POSITION_BOUNDARY
    return jnp.where(away, jnp.where(horizontal, sideways, upright), 4)


def detect(images: Float[Array, "n h w 3"]) -> Detected:
    """Finds the object in each image and reads its attributes off.

    Args:
      images: [N, H, W, 3] in [0, 1]; other sizes than 32 x 32 are resized to it first.

    Returns:
      A Detected of N images; where none was found, `found` is False.
    """
    n, size = images.shape[0], shapes.IMAGE_SIZE
    images = images.astype(jnp.float32)
    if images.shape[1:3] != (size, size):
        images = jax.image.resize(images, (n, size, size, 3), "linear", antialias=True)
    background = _background(images)
    contrast = jnp.sqrt(jnp.sum((images - background[:, None, None]) ** 2, axis=-1))
    color = _object_color(images, contrast)
    mask = _soft_mask(images, background, color)
    # Without contrast the projection above is noise over nearly zero.
    mask *= jnp.max(contrast, axis=(1, 2), keepdims=True) > MIN_CONTRAST

    area = jnp.sum(mask, axis=(1, 2))
    grid = jnp.arange(size) + 0.5
    moments = [jnp.sum(mask * grid, axis=(1, 2)), jnp.sum(mask * grid[:, None], axis=(1, 2))]
    center = jnp.stack(moments, axis=-1) / jnp.maximum(area, 1e-6)[:, None]
    radii = jnp.sqrt(area[:, None] / shapes.AREA_COEFFICIENTS)  # [N, 4] of equal area
    ideal = shapes.coverage(shapes.shape_distances(center, radii))
    shape = jnp.argmax(_overlaps(mask, ideal), axis=-1)
    radius = jnp.take_along_axis(radii, shape[:, None], axis=1)[:, 0]
    # Whatever stands out counts here, also a second object of another colour.
    expected = jnp.linalg.norm(color - background, axis=-1)[:, None, None]
    anything = _steepen(contrast / jnp.maximum(expected, MIN_CONTRAST), CLUTTER_GAIN)
    overlap = jnp.take_along_axis(_overlaps(anything, ideal), shape[:, None], axis=1)[:, 0]

    attributes = [
        shape,
        jnp.argmin(jnp.sum((color[:, None] - shapes.PALETTE) ** 2, axis=-1), axis=-1),
        radius > RADIUS_BOUNDARY,
        _position(center, radius),
        jnp.mean(background, axis=-1) > 0.5,
    ]
    found = (area >= MIN_AREA) & (area <= MAX_AREA) & (overlap >= MIN_OVERLAP)
    return Detected(
        attributes=jnp.stack([jnp.asarray(a, jnp.int32) for a in attributes], axis=-1),
        found=found,
        color=color,
        background=background,
        center=center,
        radius=radius,
        overlap=overlap,
    )


def score(
    images: Float[Array, "n h w 3"], attributes: Int[Array, "n attributes"]
) -> Float[Array, " n"]:
    """The share of the named attributes that are right.

    score = found * (number named and right) / (number named); 1 * found if none is named.

    Args:
      images: [N, H, W, 3] in [0, 1].
      attributes: [N, 5] int, -1 = not named.

    Returns:
      [N] fp32 in [0, 1]; nan for an image that is not finite, so that it is noticed.
    """
    detected = detect(images)
    named = attributes >= 0
    right = jnp.sum(named & (detected.attributes == attributes), axis=-1)
    count = jnp.sum(named, axis=-1)
    share = jnp.where(count > 0, right / jnp.maximum(count, 1), 1.0)
    share = jnp.where(detected.found, share, 0.0)
    finite = jnp.all(jnp.isfinite(images), axis=(1, 2, 3))
    return jnp.where(finite, share, jnp.nan).astype(jnp.float32)


def all_right(
    images: Float[Array, "n h w 3"], attributes: Int[Array, "n attributes"]
) -> Bool[Array, " n"]:
    """Whether an object is found and everything named is right (GenEval's strict score).

    Args:
      images: [N, H, W, 3] in [0, 1].
      attributes: [N, 5] int, -1 = not named.

    Returns:
      [N] bool.
    """
    return score(images, attributes) > 1.0 - 1e-4
