"""A rule-based judge for the shapes world: what a picture shows, and how well it is made.

The rules use no learned weights, and all of them run in the graph. Sky and ground at the border are
a colour chart: they tell the background, contrast and exposure. The horizon tells how crooked the
camera was. What differs from that background falls into connected components; each is an object if
it overlaps well enough with the ideal silhouette of a kind. Focus is read off against a sharp
drawing of what was found. It plays the part that GenEval (Ghosh et al. 2023, arXiv 2310.11513)
plays for photos.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pec_jax.shapes import finish as finishes
from pec_jax.shapes import objects, render, scenes
from pec_jax.shapes.finish import Finish
from pec_jax.shapes.scenes import CENTER, IMAGE_SIZE, MAX_OBJECTS, Scene

COMPONENTS = MAX_OBJECTS + 1  # looked at: one more than there may be
MIN_AREA = 36.0  # px of 64 x 64; the smallest object has 95
MAX_RADIUS = 17.0  # px; the largest object has 14.6
MAX_GRAIN = 0.15  # before contrast, beyond which all is noise; the worst picture has 0.06
MIN_OVERLAP = 0.5  # IoU with the best silhouette, below which a component is clutter
MIN_DIFFERENCE = 0.17  # of a pixel's colour from the background's
TOP, BOTTOM = 26, 54  # rows between which every horizon lies
OUTLIER = 0.3  # colour distance at which a pixel is neither sky nor ground
HORIZON_REACH = 3.0  # px from the horizon within which a blurred one mixes sky and ground
VOTE_DISTANCE = 0.3  # of a pixel's colour from a named one, to count for it
WIDTH = 1.1  # px by which a mask is wider than the silhouette: outline, and a blurred edge
SPREADING = 40  # rounds in which a component's label travels one pixel
MIXED = -2  # an attribute in which the objects of a picture differ
MIDDLE_REACH = 0.5  # of the way from the centre to a strip

# A kind's area in px is a r^2 + b r w + c w^2, its silhouette widened by w px, and its centroid
# lies at (x, y) r: measured on the distance fields (tests/shapes/test_judge.py).
AREAS = np.array(
    [
        (1.598, 6.219, 6.997),
        (2.436, 6.778, 5.140),
        (2.096, 6.290, 5.344),
        (1.651, 7.039, 2.928),
        (2.344, 5.886, 3.034),
        (2.082, 6.779, 3.058),
    ],
    np.float32,
)
CENTROIDS = np.array(
    [(0.027, 0.0), (0.0, 0.022), (0.0, 0.105), (0.0, 0.0), (0.0, -0.171), (0.0, -0.088)],
    np.float32,
)
GRAIN_FIELD = 0.63  # the grain's standard deviation over that of its nodes
_SIZE_BOUNDARIES = np.sqrt(scenes.RADII[0] * scenes.RADII[1])  # by number


@struct.dataclass
class Detected:
    """What was found in N images."""

    attributes: Array  # [N, 6] in the order of scenes.ATTRIBUTES; MIXED where objects differ
    found: Array  # [N] bool one to three objects; otherwise the other fields mean little
    defects: Array  # [N, 5] in the order of finish.DEFECTS
    scene: Scene  # as far as it can be told
    finish: Finish


@struct.dataclass
class _Objects:
    """The largest components of N images."""

    valid: Array  # [N, C] bool
    kind: Array  # [N, C]
    color: Array  # [N, C]
    radius: Array  # [N, C] px
    center: Array  # [N, C, 2] px, in the scene
    overlap: Array  # [N, C]


def _wide(values: Array, like: Array) -> Array:
    """[N] -> [N, 1, ...] with as many axes as `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _chroma(x: Array) -> Array:
    """Colours without their mean over channels: grain, which is grey, does not touch them."""
    return x - jnp.mean(x, axis=-1, keepdims=True)


def _border(images: Array) -> Array:
    """Median colours [N, 6] of the border's pixels above and below every horizon."""
    n, sky_end, ground_start = images.shape[0], 30, 50
    sides = images[:, :, (0, 1, -2, -1)]
    above = [images[:, :2].reshape(n, -1, 3), sides[:, :sky_end].reshape(n, -1, 3)]
    below = [images[:, -2:].reshape(n, -1, 3), sides[:, ground_start:].reshape(n, -1, 3)]
    medians = [jnp.median(jnp.concatenate(part, axis=1), axis=1) for part in (above, below)]
    return jnp.concatenate(medians, axis=-1)


@functools.cache
def _tones() -> tuple[np.ndarray, np.ndarray]:
    """Candidates of (background, contrast, exposure) [M, 3], and the border they give [M, 6]."""
    contrast = np.linspace(0.40, 1.05, 27)
    exposure = np.linspace(-0.3, 0.3, 31)
    rows = [(b, c, e) for b in range(len(scenes.SKIES)) for c in contrast for e in exposure]
    candidates = np.array(rows, np.float32)
    pair = np.concatenate([scenes.SKIES, scenes.GROUNDS], axis=-1)  # [4, 6]
    seen = candidates[:, 1:2] * (pair[candidates[:, 0].astype(int)] - 0.5) + 0.5
    return candidates, np.clip(seen + candidates[:, 2:], 0.0, 1.0)


def _tone(border: Array) -> tuple[Array, Array, Array]:
    """Background [N] int, contrast [N] and exposure [N] that explain the border [N, 6] best."""
    candidates, seen = _tones()
    # |a - b|^2 up to |b|^2, without the array of all differences.
    error = jnp.sum(seen**2, axis=-1) - 2.0 * border @ jnp.asarray(seen).T
    best = jnp.asarray(candidates)[jnp.argmin(error, axis=-1)]
    return best[:, 0].astype(jnp.int32), best[:, 1], best[:, 2]


@functools.cache
def _lines() -> tuple[np.ndarray, np.ndarray]:
    """Candidates of (height at the centre, slope) [M, 2], and their weights [M, W * H].

    The weights pick, by linear interpolation, each column's value at the line's height there, of
    H = BOTTOM - TOP + 1 heights.
    """
    heights = np.arange(36.0, 44.01, 0.25)
    slopes = np.tan(np.radians(np.linspace(-7.5, 7.5, 51)))
    candidates = np.array([(h, s) for h in heights for s in slopes], np.float32)
    x = np.arange(IMAGE_SIZE) + 0.5 - CENTER
    height = np.clip(candidates[:, :1] + candidates[:, 1:] * x, TOP, BOTTOM)  # [M, W]
    levels = np.arange(TOP, BOTTOM + 1)
    weights = np.maximum(1.0 - np.abs(height[..., None] - levels), 0.0)
    return candidates, weights.reshape(len(candidates), -1).astype(np.float32)


def _horizon(images: Array, sky: Array, ground: Array) -> tuple[Array, Array]:
    """Height at the image's centre [N] px and tilt [N] of the line between sky and ground.

    The line whose pixels above fit the sky and below the ground best; errors are cut off at
    OUTLIER, so that objects before the line do not matter.
    """
    candidates, weights = _lines()
    window = images[:, TOP:BOTTOM]
    cost = lambda color: jnp.minimum(  # noqa: E731
        jnp.sum((window - color[:, None, None]) ** 2, axis=-1), OUTLIER**2
    )
    above = jnp.cumsum(cost(sky) - cost(ground), axis=1)  # [N, H - 1, W], of a line below row y
    above = jnp.pad(above, ((0, 0), (1, 0), (0, 0)))
    columns = jnp.swapaxes(above, 1, 2).reshape(len(images), -1)  # [N, W * H]
    best = jnp.asarray(candidates)[jnp.argmin(columns @ jnp.asarray(weights).T, axis=-1)]
    tilt = jnp.arctan(best[:, 1])
    return CENTER + (best[:, 0] - CENTER) * jnp.cos(tilt), tilt


def _labels(mask: Array) -> Array:
    """Connected components of masks [N, S, S] bool: equal labels >= 1 within one, 0 outside."""
    size = mask.shape[1]
    start = jnp.arange(1, size * size + 1, dtype=jnp.int32).reshape(size, size)
    labels = jnp.where(mask, start, 0)

    def spread(_, labels):
        wide = jnp.pad(labels, ((0, 0), (1, 1), (1, 1)))
        rows = jnp.maximum(wide[:, :-2, 1:-1], wide[:, 2:, 1:-1])
        columns = jnp.maximum(wide[:, 1:-1, :-2], wide[:, 1:-1, 2:])
        return jnp.where(mask, jnp.maximum(labels, jnp.maximum(rows, columns)), 0)

    return jax.lax.fori_loop(0, SPREADING, spread, labels)


def _largest(mask: Array) -> Array:
    """Masks [N, C, S, S] of the largest components, as numbers."""
    n, size = mask.shape[:2]
    labels = _labels(mask)
    rows = jnp.arange(n)[:, None]
    counts = jnp.zeros((n, size * size + 1)).at[rows, labels.reshape(n, -1)].add(1.0)
    _, best = jax.lax.top_k(counts[:, 1:], COMPONENTS)
    return (labels[:, None] == best[..., None, None] + 1).astype(jnp.float32)


def _radius_of(area: Array) -> Array:
    """[...] px^2 -> [..., 6] px: r of each kind, as widened by WIDTH as its mask is."""
    a, b, c = jnp.moveaxis(jnp.asarray(AREAS), -1, 0)
    rest = jnp.maximum(area[..., None] - c * WIDTH**2, 0.0)
    return (jnp.sqrt((b * WIDTH) ** 2 + 4.0 * a * rest) - b * WIDTH) / (2.0 * a)


def _overlaps(masks: Array, x: Array, y: Array, centroid: Array, radius: Array) -> Array:
    """IoU [N, C, 6] of masks [N, C, S, S] with each kind's silhouette at their centroid."""
    found = []
    for kind, (cx, cy) in enumerate(CENTROIDS):
        r = radius[..., kind, None, None]
        u = (x[:, None] - centroid[..., 0, None, None]) / r + cx
        v = (y[:, None] - centroid[..., 1, None, None]) / r + cy
        ideal = objects.coverage(r * objects.silhouette(kind, u, v) - WIDTH)
        union = jnp.sum(jnp.maximum(masks, ideal), axis=(2, 3))
        found.append(jnp.sum(jnp.minimum(masks, ideal), axis=(2, 3)) / jnp.maximum(union, 1.0))
    return jnp.stack(found, axis=-1)


def _off(images: Array, sky: Array, ground: Array, below: Array) -> Array:
    """What of each pixel's colour the background does not explain [N, S, S, 3].

    Near the horizon, which may be blurred, every mixture of sky and ground is background.

    Args:
      images: [N, S, S, 3], contrast and exposure undone.
      sky: [N, 3].
      ground: [N, 3].
      below: [N, S, S] px that a pixel lies below the horizon.
    """
    axis = (ground - sky)[:, None, None]
    from_sky = images - sky[:, None, None]
    mixed = jnp.sum(from_sky * axis, axis=-1) / jnp.maximum(jnp.sum(axis**2, axis=-1), 1e-6)
    near = jnp.abs(below) < HORIZON_REACH
    share = jnp.where(near, jnp.clip(mixed, 0.0, 1.0), below > 0)
    return from_sky - share[..., None] * axis


def _objects(images: Array, off: Array, grain: Array, tilt: Array) -> _Objects:
    """Looks for objects.

    Args:
      images: [N, S, S, 3], contrast and exposure undone.
      off: [N, S, S, 3] what the background does not explain of them.
      grain: [N] its standard deviation.
      tilt: [N].
    """
    grey = jnp.maximum(jnp.abs(jnp.mean(off, axis=-1)) - 2.0 * grain[:, None, None], 0.0)
    difference = jnp.sqrt(jnp.sum(_chroma(off) ** 2, axis=-1) + grey**2)
    masks = _largest(difference > MIN_DIFFERENCE)  # [N, C, S, S]
    area = jnp.sum(masks, axis=(2, 3))
    x, y = render.grid(tilt)
    moments = [jnp.sum(masks * g[:, None], axis=(2, 3)) for g in (x, y)]
    centroid = jnp.stack(moments, axis=-1) / jnp.maximum(area, 1.0)[..., None]
    radii = jnp.maximum(_radius_of(area), 1.0)
    overlaps = _overlaps(masks, x, y, centroid, radii)
    kind = jnp.argmax(overlaps, axis=-1)
    take = lambda values: jnp.take_along_axis(values, kind[..., None], axis=-1)[..., 0]  # noqa: E731
    radius, overlap = take(radii), take(overlaps)
    return _Objects(
        valid=(area >= MIN_AREA) & (radius <= MAX_RADIUS) & (overlap >= MIN_OVERLAP),
        kind=kind,
        color=jnp.argmax(_votes(images, masks), axis=-1),
        radius=radius,
        center=centroid - radius[..., None] * jnp.asarray(CENTROIDS)[kind],
        overlap=overlap,
    )


def _votes(images: Array, masks: Array) -> Array:
    """How many pixels of each component [N, C, 6] are of each colour, by the nearest one."""
    off = images[..., None, :] - jnp.asarray(scenes.PALETTE)  # [N, S, S, 6, 3]
    distance = jnp.sum(_chroma(off) ** 2, axis=-1) + 0.3 * jnp.mean(off, axis=-1) ** 2
    near = jnp.min(distance, axis=-1) < VOTE_DISTANCE**2
    vote = jax.nn.one_hot(jnp.argmin(distance, axis=-1), len(scenes.COLORS)) * near[..., None]
    return jnp.einsum("ncij,nijk->nck", masks, vote)


def _common(values: Array, valid: Array) -> Array:
    """The value [N] that all valid objects share, or MIXED."""
    first = jnp.take_along_axis(values, jnp.argmax(valid, axis=-1)[:, None], axis=-1)
    return jnp.where(jnp.all(~valid | (values == first), axis=-1), first[:, 0], MIXED)


def _place(center: Array) -> Array:
    """Index [N] into PLACES of the objects' mean centre [N, 2]."""
    offset = (center - CENTER) / scenes.STRIP
    horizontal = jnp.abs(offset[:, 0]) >= jnp.abs(offset[:, 1])
    sideways = jnp.where(offset[:, 0] < 0, 0, 1)
    upright = jnp.where(offset[:, 1] < 0, 2, 3)
    away = jnp.max(jnp.abs(offset), axis=-1) > MIDDLE_REACH
    return jnp.where(away, jnp.where(horizontal, sideways, upright), 4)


def _sharpness(images: Array) -> Array:
    """Mean squared difference of neighbouring pixels' chroma [N]."""
    chroma = _chroma(images)
    down, across = jnp.diff(chroma, axis=1), jnp.diff(chroma, axis=2)
    return jnp.mean(down**2, axis=(1, 2, 3)) + jnp.mean(across**2, axis=(1, 2, 3))


def _blur(images: Array, scene: Scene, tilt: Array) -> Array:
    """Blur [N] px under which a sharp drawing of the scene has the images' sharpness."""
    drawing = render.draw(scene, tilt)
    levels = np.linspace(finishes.BEST_BLUR, finishes.WORST_BLUR, 7).astype(np.float32)
    n = images.shape[0]
    sharpness = jnp.stack(
        [_sharpness(finishes.blur(drawing, jnp.full(n, level))) for level in levels], axis=-1
    )
    # It falls with the blur; interpolated in its logarithm.
    known, seen = jnp.log(sharpness + 1e-9), jnp.log(_sharpness(images) + 1e-9)
    interpolate = jax.vmap(lambda x, xs: jnp.interp(x, xs[::-1], jnp.asarray(levels)[::-1]))
    return interpolate(seen, known)


def _spread(deviations: Array) -> Array:
    """Standard deviation [N] of |deviations| [N, P] of the sky and the ground, objects among them.

    Objects would shift the median towards the greater ones, by a third where they fill a fifth.
    """
    median = lambda x: jnp.nanmedian(x, axis=-1) / 0.6745  # noqa: E731
    with_objects = median(deviations)
    return median(jnp.where(deviations <= 3.0 * with_objects[:, None], deviations, jnp.nan))


def detect(images: Float[Array, "n h w 3"]) -> Detected:
    """Finds the objects in each image and reads attributes and finish off.

    Args:
      images: [N, H, W, 3] in [0, 1]; other sizes than 64 x 64 are resized to it first.

    Returns:
      A Detected of N images; where no picture of the world was found, `found` is False.
    """
    n, size = images.shape[0], IMAGE_SIZE
    images = images.astype(jnp.float32)
    if images.shape[1:3] != (size, size):
        images = jax.image.resize(images, (n, size, size, 3), "linear", antialias=True)
    border = _border(images)
    kind, contrast, exposure = _tone(border)
    # As it was before the camera: contrast and exposure undone.
    undo = lambda a: (a - 0.5 - _wide(exposure, a)) / _wide(contrast, a) + 0.5  # noqa: E731
    images, (sky, ground) = undo(images), jnp.split(undo(border), 2, axis=-1)
    horizon, tilt = _horizon(images, sky, ground)
    off = _off(images, sky, ground, render.grid(tilt)[1] - _wide(horizon, images[..., 0]))
    grey = jnp.abs(jnp.mean(off, axis=-1)).reshape(n, -1)
    grain = _spread(grey)
    seen = _objects(images, off, grain, tilt)
    scene = _scene(seen, kind, sky, ground, horizon)
    count = jnp.sum(seen.valid, axis=-1)
    found = (count >= 1) & (count <= MAX_OBJECTS) & (grain <= MAX_GRAIN)
    finish = Finish(
        blur=jnp.where(found, _blur(images, scene, tilt), finishes.WORST_BLUR),
        grain=grain * contrast / GRAIN_FIELD,
        contrast=contrast,
        exposure=exposure,
        tilt=tilt,
    )
    return Detected(scene.attributes, found, finishes.to_defects(finish), scene, finish)


def _scene(seen: _Objects, kind: Array, sky: Array, ground: Array, horizon: Array) -> Scene:
    """The scene that was found: its objects share radius and colour, as those that are drawn."""
    order = jnp.argsort(~seen.valid, axis=-1)[:, :MAX_OBJECTS]  # the valid ones first
    present = jnp.take_along_axis(seen.valid, order, axis=-1).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(present, axis=-1), 1.0)
    centers = jnp.take_along_axis(seen.center, order[..., None], axis=1)
    mean = lambda a: jnp.einsum("nk,nk...->n...", present, a) / _wide(count, a[:, 0])  # noqa: E731
    radius = mean(jnp.take_along_axis(seen.radius, order, axis=-1))
    color = mean(jnp.asarray(scenes.PALETTE)[jnp.take_along_axis(seen.color, order, axis=-1)])
    number = jnp.clip(jnp.sum(seen.valid, axis=-1) - 1, 0, MAX_OBJECTS - 1)
    attributes = [
        number,
        radius > jnp.asarray(_SIZE_BOUNDARIES)[number],
        _common(seen.color, seen.valid),
        _common(seen.kind, seen.valid),
        _place(mean(centers)),
        kind,
    ]
    return Scene(
        attributes=jnp.stack([jnp.asarray(a, jnp.int32) for a in attributes], axis=-1),
        radius=radius,
        centers=centers,
        present=present,
        color=color,
        sky=sky,
        ground=ground,
        horizon=horizon,
    )


def score(images: Float[Array, "n h w 3"], attributes: Int[Array, "n 6"]) -> Float[Array, " n"]:
    """The share of the named attributes that are right.

    score = found * (number named and right) / (number named); 1 * found if none is named.

    Args:
      images: [N, H, W, 3] in [0, 1].
      attributes: -1 = not named.

    Returns:
      fp32 in [0, 1]; nan for an image that is not finite, so that it is noticed.
    """
    detected = detect(images)
    return jnp.where(
        jnp.all(jnp.isfinite(images), axis=(1, 2, 3)), share_right(detected, attributes), jnp.nan
    )


def share_right(detected: Detected, attributes: Int[Array, "n 6"]) -> Float[Array, " n"]:
    """`score` of what was detected already."""
    named = attributes >= 0
    right = jnp.sum(named & (detected.attributes == attributes), axis=-1)
    count = jnp.sum(named, axis=-1)
    share = jnp.where(count > 0, right / jnp.maximum(count, 1), 1.0)
    return jnp.where(detected.found, share, 0.0).astype(jnp.float32)


def all_right(images: Float[Array, "n h w 3"], attributes: Int[Array, "n 6"]) -> Bool[Array, " n"]:
    """Whether everything named is right (GenEval's strict score); -1 = not named."""
    return score(images, attributes) > 1.0 - 1e-4
