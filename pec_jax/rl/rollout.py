"""The rollout: K images of each of P prompts, drawn by the current policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pec_jax.data.stream import repeat_groups
from pec_jax.distributed.mesh import over_batch
from pec_jax.flow.sampler import image_keys, swap_images_and_steps
from pec_jax.rl.policy import Policy
from pec_jax.types import Batch, Frozen, PyTree, Trajectory


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a rollout is drawn, and what it keeps.

    Attributes:
        policy: which draws.
        group_size: K.
        images: of every group, sampled at once; 0 is all. What is drawn does not depend on it.
        paths: keep states and log-probs.
        predictions: keep what each step predicts the image to be.
    """

    policy: Policy
    group_size: int
    images: int
    paths: bool
    predictions: bool


def rollout(
    drawing: Drawing, params: PyTree, inputs: tuple[Frozen, Batch], key: Array
) -> Trajectory:
    """Samples K paths for each prompt; N = P * K, group by group.

    Args:
        drawing: static.
        params: of the policy.
        inputs: all that does not learn, and the prompts.
        key: of the iteration.
    """
    return rollout_and(drawing, params, inputs, key, lambda x_0: ())[0]


def rollout_and(
    drawing: Drawing,
    params: PyTree,
    inputs: tuple[Frozen, Batch],
    key: Array,
    then: Callable[[Array], PyTree],
) -> tuple[Trajectory, PyTree]:
    """`rollout`, and what is made of the final latents while more of them are drawn.

    Args:
        drawing: static.
        params: of the policy.
        inputs: all that does not learn, and the prompts.
        key: of the iteration.
        then: from final latents [P, k, *latent] to a tree of arrays [P, k, ...]. It is called with
            as many images of every group as are drawn at once: what it starts on the host goes on
            while the next ones are drawn.

    Returns:
        The trajectory, and what `then` gives [P, K, ...].
    """
    frozen, batch = inputs
    num_groups, size, shape = (
        batch.prompt_ids.shape[0],
        drawing.group_size,
        drawing.policy.latent_shape,
    )
    noise, steps = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    x_1 = over_batch(jax.random.normal(noise, (num_groups, size, *shape)))
    keys = image_keys(steps, num_groups * size).reshape(num_groups, size)

    def draw(chunk):  # some images of every group: [P, k, ...]
        x_1, keys = chunk
        images = x_1.shape[1]
        actor = drawing.policy.before(frozen, over_batch(repeat_groups(batch.conditioning, images)))
        drawn = actor.sample(
            params,
            over_batch(x_1.reshape(-1, *shape)),
            keys.reshape(-1),
            paths=drawing.paths,
            predictions=drawing.predictions,
        )
        grouped = jax.tree.map(
            lambda a: a.reshape(num_groups, images, *a.shape[1:]), swap_images_and_steps(drawn)
        )
        return grouped, then(grouped.x_0)

    drawn, made = map_images(draw, (x_1, keys), drawing.images)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), drawn)
    return swap_images_and_steps(flat), made


def map_images(function: Callable, tree: PyTree, images: int) -> PyTree:
    """`function` over arrays [P, K, ...], `images` of every group at a time, to bound memory.

    Args:
        function: from a tree of arrays [P, k, ...] to another one.
        tree: arrays [P, K, ...].
        images: k, a divisor of K; 0 is all.

    Returns:
        What `function` returns, [P, K, ...].
    """
    size = jax.tree.leaves(tree)[0].shape[1]
    if images in (0, size):
        return function(tree)

    def split(a):  # [P, K, ...] -> [C, P, k, ...]
        pieces = a.reshape(a.shape[0], -1, images, *a.shape[2:])
        return over_batch(jnp.moveaxis(pieces, 1, 0), axis=1)

    def join(a):
        a = jnp.moveaxis(a, 0, 1)
        return over_batch(a.reshape(a.shape[0], size, *a.shape[3:]))

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, tree)))
