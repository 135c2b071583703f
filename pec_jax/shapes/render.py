"""Pictures of scenes: objects before sky and ground, by signed distances, with a finish."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.shapes import finish as finishes
from pec_jax.shapes import objects
from pec_jax.shapes.finish import Finish
from pec_jax.shapes.objects import coverage
from pec_jax.shapes.scenes import CENTER, IMAGE_SIZE, KIND, MAX_OBJECTS, Scene


def grid(tilt: Float[Array, " n"]) -> tuple[Array, Array]:
    """Where each pixel's centre lies in the scene, px: [N, S, S] across and down.

    The camera is turned by `tilt` about the image's centre.
    """
    offset = jnp.arange(IMAGE_SIZE) + 0.5 - CENTER
    across, down = offset[None, :], offset[:, None]
    cos, sin = jnp.cos(tilt)[:, None, None], jnp.sin(tilt)[:, None, None]
    return CENTER + cos * across + sin * down, CENTER - sin * across + cos * down


def _over(image: Array, alpha: Array, color: Array) -> Array:
    return image + alpha[..., None] * (color - image)


def background(
    sky: Float[Array, "n 3"],
    ground: Float[Array, "n 3"],
    horizon: Float[Array, " n"],
    tilt: Float[Array, " n"],
) -> Float[Array, "n s s 3"]:
    """Sky over ground, without objects."""
    y = grid(tilt)[1]
    image = jnp.broadcast_to(ground[:, None, None], (*y.shape, 3))
    return _over(image, coverage(y - horizon[:, None, None]), sky[:, None, None])


def draw(scene: Scene, tilt: Float[Array, " n"]) -> Float[Array, "n s s 3"]:
    """Sharp pictures in [0, 1], seen by a camera turned by `tilt` radians."""
    x, y = grid(tilt)
    image = background(scene.sky, scene.ground, scene.horizon, tilt)
    paints = jnp.asarray(objects.PAINTS)[scene.attributes[:, KIND]]  # [N, LAYERS, 4]
    colors = paints[..., :1] * scene.color[:, None] + paints[..., 1:]
    radius = scene.radius[:, None, None]
    for i in range(MAX_OBJECTS):
        u = (x - scene.centers[:, i, 0, None, None]) / radius
        v = (y - scene.centers[:, i, 1, None, None]) / radius
        silhouette, layers = _of_kind(scene.attributes[:, KIND], u, v)
        there = scene.present[:, i, None, None]
        outline = coverage(radius * silhouette - objects.OUTLINE)
        image = _over(image, there * outline, jnp.asarray(objects.OUTLINE_COLOR))
        for layer in range(objects.LAYERS):
            alpha = there * coverage(radius * layers[..., layer])
            image = _over(image, alpha, colors[:, layer, None, None])
    return image


def _of_kind(kind: Array, u: Array, v: Array) -> tuple[Array, Array]:
    silhouettes, layers = objects.distances(u, v)
    index = kind[:, None, None, None]
    silhouette = jnp.take_along_axis(silhouettes, index, axis=3)[..., 0]
    return silhouette, jnp.take_along_axis(layers, index[..., None], axis=3)[..., 0, :]


def render(key: Array, scene: Scene, finish: Finish) -> Float[Array, "n s s 3"]:
    """Pictures in [0, 1].

    Args:
      key: of the grain.
      scene: N scenes.
      finish: of each.
    """
    return finishes.develop(key, draw(scene, finish.tilt), finish)


def perfect(n: int) -> Finish:
    """The finish without a defect."""
    return finishes.from_defects(jax.random.key(0), jnp.zeros((n, len(finishes.DEFECTS))))
