"""What an iteration is made of, ready to be timed: from weights on the disk, or from shapes.

`loaded` is what a run loads. `drawn` fills the shapes of the config's models, published ones too,
with random numbers where they lie, so that a full-size step can be timed where the weights are
unavailable: time depends on shapes alone.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pec_jax.config import Config, ConfigError, from_config_dict, to_dict
from pec_jax.config.registry import CONSTRAINTS
from pec_jax.data.stream import PromptStream
from pec_jax.distributed import mesh as sharding
from pec_jax.perception.spaces import surprisal_function
from pec_jax.profiling import aot as ahead
from pec_jax.rl.score import Space
from pec_jax.rl.signals import PERCEPTUAL
from pec_jax.rl.train_step import Program
from pec_jax.training import build as assemble
from pec_jax.types import Array, Batch, Frozen, PyTree, TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
    """One program and its arguments, where they lie."""

    config: Config
    program: Program
    mesh: Mesh
    shardings: TrainState  # where the state lies
    params: PyTree  # what learns, at the start
    frozen: Frozen
    batch: Batch
    key: Array


def loaded(config: Config) -> Setup:
    """The config's models and first prompts, loaded and placed as the trainer does it."""
    mesh = sharding.make_mesh(config)
    place = sharding.placement(mesh, config)
    experiment = assemble.build(config, place)
    program = experiment.program
    state = jax.eval_shape(program.initial_state, experiment.params)
    optimizer = program.learner.optimizer
    shardings = sharding.state_shardings(state, experiment.param_axes, optimizer, place)
    groups, table = config.batch.groups, experiment.tables["train"]
    ids = PromptStream(len(table), groups, config.seed).ids(0)
    ids = ids[sharding.local_groups(mesh, groups)]
    return Setup(
        config=config,
        program=program,
        mesh=mesh,
        shardings=shardings,
        params=jax.tree.map(sharding.put_array, experiment.params, shardings.params),
        frozen=sharding.put_replicated(experiment.frozen, mesh),
        batch=sharding.put_batch(table.gather(ids), mesh, groups),
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
    return Setup(config, program, mesh, shardings, params, frozen, batch, key)


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
        # One instruction, where the default generator is a page of code to compile for each shape.
        noise = jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.float32)
        return (noise * scale + offset).astype(dtype)

    return jax.jit(draw, out_shardings=where)


def with_fields(setup: Setup, fields: Mapping[str, Any]) -> Setup:
    """The same weights and prompts under a config with other fields: pieces, remat, updates.

    Args:
      setup: of which all arrays stay.
      fields: by their paths in the config, {"batch.update_images": 4}.

    Raises:
      ConfigError: a field that does not exist, a value it cannot have, or one that asks for arrays
        of other shapes.
    """
    values = to_dict(setup.config)
    for path, value in fields.items():
        *sections, name = path.split(".")
        functools.reduce(lambda s, key: s.setdefault(key, {}), sections, values)[name] = value
    config = from_config_dict(values)
    mesh, program, arguments, shardings = ahead.abstract_step(config, jax.devices())
    # A published network is known by a temporary path, which is another one here.
    needed, there = (arguments.state.params, arguments.frozen), (setup.params, setup.frozen)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (needed, there)]
    if shapes[0] != shapes[1] or config.batch.groups != setup.config.batch.groups:
        raise ConfigError(f"{', '.join(fields)}: asks for other weights or another batch.")
    params, frozen = jax.tree.unflatten(jax.tree.structure(needed), jax.tree.leaves(there))
    return Setup(config, program, mesh, shardings, params, frozen, setup.batch, setup.key)


def fields_of(text: str) -> dict[str, Any]:
    """Fields and their values from "model.remat=none,batch.update_images=4".

    Raises:
      ConfigError: something else.
    """
    found = {}
    for part in text.split(","):
        path, equals, value = part.partition("=")
        if not (path and equals):
            raise ConfigError(f"{text!r}: give FIELD=VALUE, with commas between them.")
        found[path] = _literal(value)
    return found


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a word
        return value


def constraint_sections(text: str) -> dict[str, dict[str, Any]]:
    """Fields of `config.constraints` from "none" or "pec.weight=1.5,pec.unit=reward_std".

    Raises:
      ConfigError: something else.
    """
    sections: dict[str, dict[str, Any]] = {}
    for part in [] if text == "none" else text.split(","):
        path, equals, value = part.partition("=")
        name, dot, field = path.partition(".")
        if not (equals and dot):
            raise ConfigError(
                f"--against is {text!r}; give none, or fields of config.constraints such as "
                "kl.weight=0.01, with commas between them."
            )
        sections.setdefault(name, {})[field] = _literal(value)
    return sections


def with_constraints(setup: Setup, sections: Mapping[str, Mapping[str, Any]]) -> Setup:
    """The same setup with other constraints.

    Args:
      setup: of which all else stays.
      sections: fields of `config.constraints`; those that are left out have their defaults, which
        are off.

    Raises:
      ConfigError: a name or a field that does not exist, or methods that do not go together.
    """
    built = CONSTRAINTS.build_sections(sections, "config.constraints")
    config = dataclasses.replace(setup.config, constraints=built)
    assemble.check(config)
    learner = setup.program.learner
    constraints = assemble.make_constraints(config, learner.objective)
    whole = sharding.replicated(setup.mesh)
    states = jax.tree.map(lambda _: whole, constraints.initial_states())
    return dataclasses.replace(
        setup,
        config=config,
        program=dataclasses.replace(
            setup.program, learner=dataclasses.replace(learner, constraints=constraints)
        ),
        shardings=setup.shardings.replace(constraints=states),
    )


def with_estimator(setup: Setup, estimator: str) -> Setup:
    """The same setup with another estimator of the perceptual entropy.

    Raises:
      ConfigError: a name that does not exist.
    """
    perception = dataclasses.replace(setup.config.perception, estimator=estimator)
    step_std = assemble.reached_std(setup.program.learner.policy.sampler)
    return dataclasses.replace(
        setup,
        config=dataclasses.replace(setup.config, perception=perception),
        program=_rescored(setup.program, surprisal=surprisal_function(perception, step_std)),
    )


def _rescored(program: Program, **changes: Any) -> Program:
    """The program with other parts of its scorer."""
    return dataclasses.replace(program, scorer=dataclasses.replace(program.scorer, **changes))


def reading_perception(setup: Setup) -> list[str]:
    """Names of the constraints that look at the surprisal of the images."""
    return [
        constraint.name
        for constraint, options in setup.program.learner.constraints
        if constraint.uses_space and getattr(options, "space", PERCEPTUAL) == PERCEPTUAL
    ]


def without_perception(setup: Setup) -> Setup:
    """The setup with no perceptual encoder and no estimator in it: plain Flow-GRPO's iteration.

    A run measures the perceptual entropy under every constraint, to log it. Here the features are
    the image's mean colour and the surprisal is 0, at next to no cost, and the metrics of both
    mean nothing.

    Raises:
      ConfigError: a constraint needs the surprisal.
    """
    if readers := reading_perception(setup):
        raise ConfigError(
            f"config.constraints.{readers[0]} needs the perceptual surprisal, so that there is no "
            "iteration without it: turn it off."
        )
    program = _rescored(
        setup.program,
        spaces=_in_mean_color(setup.program, set(setup.program.scorer.spaces)),
        surprisal=lambda features: jnp.zeros(next(iter(features.values())).shape[:-1]),
        at_steps=None,
    )
    drawing = dataclasses.replace(program.drawing, predictions=False)
    return dataclasses.replace(setup, program=dataclasses.replace(program, drawing=drawing))


def shared_spaces(program: Program) -> set[str]:
    """Names of the perceptual spaces whose encoder is also a reward's."""
    scorer = program.scorer
    networks = {reward.network for reward in scorer.reward.rewards.values()}
    return {name for name, space in scorer.spaces.items() if space.network in networks}


def as_compiled(program: Program) -> Program:
    """The program with every encoder in it once: one that is reward and perception is shared.

    The compiler finds the two equal and runs one; FLOPs are counted before the compiler.
    """
    if program.scorer.at_steps is not None:  # other images than the reward's
        return program
    return _rescored(program, spaces=_in_mean_color(program, shared_spaces(program)))


def _in_mean_color(program: Program, names: set[str]) -> dict[str, Space]:
    """The program's spaces, those of the given names with the image's mean colour for features."""
    return {
        name: dataclasses.replace(space, features=_mean_color) if name in names else space
        for name, space in program.scorer.spaces.items()
    }


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
