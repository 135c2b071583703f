"""What an iteration is made of, ready to be timed: from weights on the disk, or from shapes.

`loaded` is what a run loads. `drawn` fills the shapes of the config's models, published ones too,
with random numbers where they lie, so that a full-size step can be timed where the weights cannot
be had: time depends on shapes alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from pec_jax.rl.program import Frozen, Program

from pec_jax.config import Config, ConfigError
from pec_jax.data.stream import PromptStream
from pec_jax.distributed import mesh as sharding
from pec_jax.profiling import aot as ahead
from pec_jax.rl import program as program_lib
from pec_jax.rl.constraints import get_constraint
from pec_jax.training import build as assemble
from pec_jax.types import Array, Batch, PyTree, TrainState

# Constraints that do not look at the perceptual surprisal, in whatever space.
_BLIND = ("none", "kl", "clip_higher")


@dataclasses.dataclass(frozen=True)
class Setup:
    """One program and its arguments, where they lie."""

    program: Program
    mesh: Mesh
    shardings: TrainState  # where the state lies
    params: PyTree  # what learns, at the start
    frozen: Frozen
    batch: Batch
    key: Array

    @property
    def config(self) -> Config:
        """The program's."""
        return self.program.config


def loaded(config: Config) -> Setup:
    """The config's models and first prompts, loaded and placed as `train` does it."""
    mesh = sharding.make_mesh(config)
    place = sharding.placement(mesh, config)
    world = assemble.make_world(config, place)
    shardings = program_lib.state_shardings(world.program, world.params, world.param_axes, place)
    groups = config.batch.groups
    ids = PromptStream(len(world.train), groups, config.seed).ids(0)
    ids = ids[sharding.local_groups(mesh, groups)]
    return Setup(
        program=world.program,
        mesh=mesh,
        shardings=shardings,
        params=jax.tree.map(sharding.put_array, world.params, shardings.params),
        frozen=sharding.put_replicated(world.frozen, mesh),
        batch=sharding.put_batch(world.train.gather(ids), mesh, groups),
        key=sharding.put_replicated(assemble.stream_key(config, assemble.TRAIN_STREAM), mesh),
    )


def drawn(config: Config) -> Setup:
    """Random weights and embeddings of the shapes of the config's models; nothing is read."""
    mesh, program, arguments, shardings = ahead.abstract_step(config, jax.devices())
    params = jax.tree.map(
        lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
        arguments.state.params,
        shardings.params,
    )
    params, frozen, batch = jax.tree_util.tree_map_with_path(
        _draw, (params, arguments.frozen, arguments.batch)
    )
    key = sharding.put_replicated(assemble.stream_key(config, assemble.TRAIN_STREAM), mesh)
    return Setup(program, mesh, shardings, params, frozen, batch, key)


def _draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
    """Random numbers that keep activations at their scale, made where they lie."""
    name, text = jax.tree_util.keystr(path[-1:], simple=True), jax.tree_util.keystr(path)
    scale, offset = 0.1, 1.0 if name == "scale" else 0.0
    if name == "kernel":  # [..., in, out], or [kh, kw, in, out] of a convolution
        scale = 1 / math.sqrt(math.prod(leaf.shape[-4 if len(leaf.shape) == 4 else -2 : -1]))
    return _normal(leaf.shape, leaf.dtype, leaf.sharding)(
        zlib.crc32(text.encode()) >> 1, jnp.float32(scale), jnp.float32(offset)
    )


@functools.cache
def _normal(shape: tuple[int, ...], dtype: Any, where: jax.sharding.Sharding) -> Any:
    """A compiled (seed, scale, offset) -> array; one for all arrays of a kind."""

    def draw(seed, scale, offset):
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.ones(shape, dtype) if dtype == jnp.bool_ else jnp.zeros(shape, dtype)
        noise = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        return (noise * scale + offset).astype(dtype)

    return jax.jit(draw, out_shardings=where)


def with_method(setup: Setup, *, constraint: str = "", estimator: str = "") -> Setup:
    """The same setup with another constraint, or another estimator of the perceptual entropy.

    Raises:
      ConfigError: a name that does not exist.
    """
    config = setup.config
    if constraint:
        changed = dataclasses.replace(config.constraint, name=constraint)
        config = dataclasses.replace(config, constraint=changed)
    if estimator:
        changed = dataclasses.replace(config.perception, estimator=estimator)
        config = dataclasses.replace(config, perception=changed)
    assemble.check_names(config)
    program = dataclasses.replace(
        setup.program,
        config=config,
        constraint=get_constraint(config.constraint.name),
        surprisal=assemble.surprisal_function(config, setup.program.step_std()),
    )
    return dataclasses.replace(setup, program=program)


def needs_perception(config: Config) -> bool:
    """Whether the constraint looks at the surprisal of the images, or it is only logged."""
    return config.constraint.name not in _BLIND and config.constraint.space == "perceptual"


def without_perception(setup: Setup) -> Setup:
    """The setup with no perceptual encoder and no estimator in it: plain Flow-GRPO's iteration.

    A run measures the perceptual entropy under every constraint, to log it. Here the features are
    the image's mean colour and the surprisal is 0, at next to no cost, and the metrics of both
    mean nothing.

    Raises:
      ConfigError: the constraint needs the surprisal.
    """
    config = setup.config
    if needs_perception(config):
        raise ConfigError(
            f"The constraint {config.constraint.name!r} needs the perceptual surprisal, so that "
            "there is no iteration without it; leave perception out of 'none', 'kl' or "
            "'clip_higher' only."
        )
    final = dataclasses.replace(config.perception, at="final")
    program = dataclasses.replace(
        setup.program,
        config=dataclasses.replace(config, perception=final),
        features=dict.fromkeys(setup.program.features, _mean_color),
        surprisal=lambda features: jnp.zeros(next(iter(features.values())).shape[:-1]),
    )
    return dataclasses.replace(setup, program=program)


def as_compiled(program: Program) -> Program:
    """The program with every encoder in it once: one that is reward and perception is shared.

    The compiler finds the two equal and runs one; FLOPs are counted before the compiler.
    """
    shared = {name for name in program.spaces if name in program.reward_encoder.values()}
    features = {
        name: _mean_color if name in shared else function
        for name, function in program.features.items()
    }
    if program.config.perception.at == "steps":  # other images than the reward's
        return program
    return dataclasses.replace(program, features=features)


def _mean_color(params: PyTree, images: Array) -> Array:
    """Images [N, H, W, 3] -> [N, 3]."""
    del params
    return jnp.mean(images, axis=(1, 2))


def host_batch(setup: Setup) -> Batch:
    """The batch as NumPy arrays, float32."""
    return jax.tree.map(
        lambda a: np.asarray(a, np.float32 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype),
        setup.batch,
    )
