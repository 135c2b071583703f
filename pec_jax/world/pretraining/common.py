"""What the new world's stages share beside `pec_jax.shapes.pretraining.common`: their pictures."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from pec_jax.shapes.pretraining import common
from pec_jax.world import finish, render
from pec_jax.world import scenes as shapes

Array = jax.Array


@struct.dataclass
class Pictures:
    """Pictures, and all that is known of them."""

    images: Array  # [N, 64, 64, 3] in [0, 1]
    attributes: Array  # [N, 6], none open
    defects: Array  # [N, 5] of the finish, in [0, 1]


@functools.partial(jax.jit, static_argnums=1)
def draw_pictures(key: Array, n: int) -> Pictures:
    """Random scenes with the finish of the web."""
    attribute_key, defect_key, picture_key = jax.random.split(key, 3)
    nothing = jnp.full((n, len(shapes.ATTRIBUTES)), shapes.OPEN, jnp.int32)
    attributes = shapes.fill_open(attribute_key, nothing)
    defects = finish.draw_defects(defect_key, n)
    return Pictures(take(picture_key, attributes, defects), attributes, defects)


@jax.jit
def take(key: Array, attributes: Array, defects: Array) -> Array:
    """One picture [N, 64, 64, 3] for each row of attributes [N, 6], with these defects [N, 5]."""
    scene_key, sign_key, grain_key = jax.random.split(key, 3)
    scene = shapes.sample_scene(scene_key, attributes)
    return render.render(grain_key, scene, finish.from_defects(sign_key, defects))


def augment(key: Array, images: Array) -> Array:
    """Fainter than the first world's: the finish of a picture is what a judge does care for."""
    return common.augment(key, images, jitter=0.015, noise=0.015, blur=0.2)
