"""What several stages share: initial variables, training images, and files on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import struct

from pec_jax.models.layers import Dense
from pec_jax.shapes import finish, render
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining.loop import write_atomically
from pec_jax.weights import convert, tensors

Array = jax.Array
PyTree = Any


def initialise(module: nn.Module, key: Array, *inputs: Any, **kwargs: Any) -> PyTree:
    """The module's variables as plain arrays, {"params": ..., ["buffers": ...]}."""
    init = jax.jit(lambda k, *args: nn.meta.unbox(module.init(k, *args, **kwargs)))
    return dict(init(key, *inputs))


def spread_positions(params: PyTree, std: float = 0.3) -> PyTree:
    """Redraws nothing, but widens the position embeddings of a fresh vision tower.

    At the usual 0.02 a patch's content, of order 1 here, drowns its place, and hundreds of steps
    pass before a tower this small notices where things are.
    """
    from jax.tree_util import keystr, tree_map_with_path

    def widen(path, leaf):
        name = keystr(path)
        if "position_embedding" in name and "text_model" not in name:
            return leaf * (std / jnp.std(leaf))
        return leaf

    return tree_map_with_path(widen, params)


def save(directory: Path, variables: PyTree, stem: str) -> int:
    """Writes a model's variables as safetensors of half precision under torch's names.

    Args:
        directory: the model's, which holds its config.json.
        variables: Flax variables.
        stem: `model` (transformers) or `diffusion_pytorch_model` (diffusers).

    Returns:
        The number of bytes in its tensors.
    """
    halves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), variables)
    named = convert.to_torch(halves)
    # NumPy's contiguous copy has turned CLIP's scalar into a vector of one.
    named = {name: a.reshape(()) if name == "logit_scale" else a for name, a in named.items()}
    content = safetensors.numpy.save(named, metadata={"format": "pt"})
    write_atomically(directory / f"{stem}.safetensors", content)
    return sum(array.nbytes for array in named.values())


def load(directory: Path, module: nn.Module, stem: str, *inputs: Any, **kwargs: Any) -> PyTree:
    """Reads the variables that `save` wrote, as fp32."""
    abstract = jax.eval_shape(
        lambda *args: nn.meta.unbox(module.init(jax.random.key(0), *args, **kwargs)), *inputs
    )
    variables = convert.from_torch(tensors.read_tensors(directory, stem=stem), abstract)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)


def flat_dense(call: Callable, args: Any, kwargs: Any, context: Any) -> Array:
    """For `nn.intercept_methods`: linear layers see [N L, D] instead of [N, L, D].

    On CPU, XLA takes a weight's gradient over two contracted axes the slow way: a feed-forward
    block of this size trains three times faster with one.
    """
    if not isinstance(context.module, Dense) or context.method_name != "__call__":
        return call(*args, **kwargs)
    (x,) = args
    return call(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


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


@jax.jit
def hide_some(key: Array, attributes: Array, specified: float = 0.3) -> Array:
    """Captions from open to fully specified, each number of named attributes made common.

    The share of attributes hidden is uniform in [0, 1] for each caption, except that a part of
    the captions keeps all.

    Args:
        key: PRNG key.
        attributes: [N, 6], none open.
        specified: probability that a caption names everything, beyond chance.

    Returns:
        [N, 5] with -1 where the caption is silent.
    """
    share_key, keep_key, hide_key = jax.random.split(key, 3)
    n = attributes.shape[0]
    share = jax.random.uniform(share_key, (n, 1))
    share = jnp.where(jax.random.bernoulli(keep_key, specified, (n, 1)), 0.0, share)
    return shapes.hide(hide_key, attributes, share)


def to_pixels(images: Array) -> Array:
    """[0, 1] -> [-1, 1]: what the VAE and all encoders here are fed with."""
    return 2.0 * images - 1.0


@jax.jit
def augment(
    key: Array, images: Array, jitter: float = 0.015, noise: float = 0.015, blur: float = 0.2
) -> Array:
    """Light photometric augmentation: gain and offset, some blur, some noise.

    A generator's images are never quite as rendered ones are; a judge must not care. What it must
    see, the finish, is left as it is: so all of this is faint.

    Args:
        key: PRNG key.
        images: [N, H, W, 3] in [0, 1].
        jitter: largest change of gain, and of offset, per image and channel.
        noise: largest standard deviation of the pixel noise.
        blur: largest share of the mean over 3 x 3 pixels.

    Returns:
        [N, H, W, 3] in [0, 1].
    """
    keys = jax.random.split(key, 5)
    n = images.shape[0]
    gain = 1.0 + jax.random.uniform(keys[0], (n, 1, 1, 3), minval=-jitter, maxval=jitter)
    offset = jax.random.uniform(keys[1], (n, 1, 1, 3), minval=-jitter, maxval=jitter)
    rows = images + jnp.roll(images, 1, axis=1) + jnp.roll(images, -1, axis=1)
    blurred = (rows + jnp.roll(rows, 1, axis=2) + jnp.roll(rows, -1, axis=2)) / 9.0
    amount = jax.random.uniform(keys[2], (n, 1, 1, 1), maxval=blur)
    deviation = jax.random.uniform(keys[3], (n, 1, 1, 1), maxval=noise)
    images = (images + amount * (blurred - images)) * gain + offset
    images += deviation * jax.random.normal(keys[4], images.shape)
    return jnp.clip(images, 0.0, 1.0)


def normalise(x: Array) -> Array:
    """Unit vectors along the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
