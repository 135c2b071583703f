"""The train step of a config, ahead-of-time compiled for a topology you do not have.

Everything is a shape: no weights are read and no memory is taken, so that a step for a pod
compiles on a laptop. The program is the one that trains: the same functions, shardings and
donation, written for the topology's platform and not for the machine that compiles it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from pec_jax import io
from pec_jax.config import Config, ConfigError, unknown
from pec_jax.data.prompts import Prompt
from pec_jax.distributed import mesh as sharding
from pec_jax.families.base import Pipeline
from pec_jax.families.locate import pipeline_directory
from pec_jax.families.registry import published_pipelines
from pec_jax.perception.networks import Networks
from pec_jax.perception.published import ENCODERS
from pec_jax.profiling import flops
from pec_jax.profiling.chips import CHIPS, Chip, roofline
from pec_jax.profiling.collectives import collectives
from pec_jax.profiling.schedule import longest, schedule
from pec_jax.rewards.base import Reward
from pec_jax.rl.train_step import Program, train_step
from pec_jax.training import build, parts
from pec_jax.types import Batch, Frozen, PyTree, TrainState
from pec_jax.weights import published
from pec_jax.weights.hub import model_directory

LONGEST = 12  # operations of the source that a report names


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the train step takes, as shapes with their places."""

    state: TrainState
    frozen: Frozen
    batch: Batch
    key: jax.ShapeDtypeStruct


_SINGLE_CHIP = re.compile(r"\w+:1(x1){1,2}")


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A train step, compiled.

    Attributes:
        executable: for the devices of the mesh.
        arguments: what it takes.
        flops: of the program before the compiler, over all devices together; see `flops`.
        seconds: that tracing and compiling took.
    """

    executable: Any
    arguments: Arguments
    flops: int
    seconds: float


def topology_devices(name: str) -> tuple[list[Any], Chip]:
    """The devices of a topology such as "v5e:4x4", and what one of them can do.

    Raises:
      ConfigError: a chip we do not know, or a topology that libtpu does not.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise ConfigError("--topology: " + unknown("chip", kind, CHIPS))
    # libtpu counts four chips to a host, of which a single one is not a multiple.
    alone = {"chips_per_host_bounds": [1, 1, 1]} if _SINGLE_CHIP.fullmatch(name) else {}
    try:
        topology = topologies.get_topology_desc(name, platform="tpu", **alone)
    except Exception as error:  # libtpu is missing, or knows no such topology
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--topology={name} is unavailable: {reason} Install the TPU compiler with "
            "`pip install 'pec_jax[tpu]'`, and give chips as kind:AxB, such as v5e:4x4, or "
            "v5p:4x4x4."
        ) from None
    return list(topology.devices), CHIPS[kind]


def compile_step(config: Config, devices: list[Any]) -> CompiledStep:
    """Compiles the train step for devices that need not be present.

    Raises:
      ConfigError: the config does not fit the devices, or names a model that is neither on the
        disk nor published.
    """
    mesh, program, arguments, shardings = abstract_step(config, devices)
    if mesh.size != len(devices):
        raise ConfigError(
            f"config.mesh is {dict(mesh.shape)}, {mesh.size} of {len(devices)} chips: choose "
            "another config.mesh, or a config.batch.groups that divides over all of them."
        )
    step = jax.jit(
        functools.partial(train_step, program),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    start = time.perf_counter()
    with sharding.active(mesh, config):
        traced = step.trace(arguments.state, arguments.frozen, arguments.batch, arguments.key)
        executable = traced.lower().compile()
    seconds = time.perf_counter() - start
    return CompiledStep(executable, arguments, flops.of_jaxpr(traced.jaxpr.jaxpr), seconds)


def abstract_step(
    config: Config, devices: list[Any]
) -> tuple[Mesh, Program, Arguments, TrainState]:
    """The mesh, the program, its arguments as shapes, and where its state lies; nothing is read.

    Raises:
      ConfigError: as `compile_step`.
    """
    build.check(config)
    mesh = sharding.make_mesh(config, devices)
    place = sharding.placement(mesh, config)
    with tempfile.TemporaryDirectory() as scratch:
        pipeline, networks = _architecture(config, place, Path(scratch))
        program = build.make_program(config, pipeline, build.make_judges(config, networks))
    return mesh, program, *_arguments(config, program, (pipeline, networks), place)


def _architecture(
    config: Config, place: sharding.Placement, scratch: Path
) -> tuple[Pipeline, Networks]:
    """The pipeline and the source of networks, with shapes for weights."""
    root = config_files(config.model.path, scratch / "pipeline", pipeline=True)
    pipeline = build.load_model(config, root, place, weights=False)
    networks = Networks(
        own=root / "encoders",
        locate=lambda model: config_files(model, scratch / model.replace("/", "_"), pipeline=False),
        dtype=jnp.dtype(config.model.encoder_dtype),
        rounding=config.model.encoder_resize,
        place=place,
        weights=False,
    )
    return pipeline, networks


def config_files(name: str, scratch: Path, *, pipeline: bool) -> Path:
    """The directory of a model's config files: the model's own, or those that are published.

    Args:
      name: as in a config.
      scratch: where published files are written.
      pipeline: whether it is a pipeline, or else an encoder.

    Raises:
      ConfigError: neither a directory nor published.
    """
    if name == "shapes" or io.path(name).exists():
        return pipeline_directory(name) if pipeline else model_directory(name)
    models = published_pipelines() if pipeline else ENCODERS
    files = published.find(name, models)
    if files is None:
        raise ConfigError(
            f"{name}: neither a directory nor one of the published models whose shapes are known, "
            f"{', '.join(models)}."
        )
    return published.write(files, scratch)


def _arguments(
    config: Config, program: Program, models: tuple[Pipeline, Networks], place: sharding.Placement
) -> tuple[Arguments, TrainState]:
    """The step's arguments as shapes, and where its state lies."""
    pipeline, networks = models
    weights = pipeline.transformer_variables["params"]
    params = jax.eval_shape(lambda w: parts.trainable_params(config, w), weights)
    axes = build.trainable_axes(config, pipeline, params)
    state = jax.eval_shape(program.initial_state, params)
    shardings = sharding.state_shardings(state, axes, program.learner.optimizer, place)
    state = jax.tree.map(_placed, state, shardings)
    whole: Any = place((), ())
    groups = sharding.over_groups(whole.mesh)
    conditioning = jax.tree.map(
        lambda a: _shape((config.batch.groups, *a.shape), groups, a.dtype),
        pipeline.conditioning_shapes(),
    )
    frozen = Frozen(
        transformer=pipeline.transformer_variables,
        vae=pipeline.vae_variables,
        negative=jax.tree.map(lambda a: _shape((1, *a.shape[1:]), whole, a.dtype), conditioning),
        networks=networks.without_text(),
    )
    batch = Batch(
        prompt_ids=_shape((config.batch.groups,), groups, jnp.int32),
        conditioning=conditioning,
        reward_inputs={
            name: _reward_inputs(reward, config.batch.groups, groups)
            for name, reward in program.scorer.reward.rewards.items()
        },
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Arguments(state, frozen, batch, _placed(key, whole)), shardings


def _reward_inputs(reward: Reward, num_groups: int, where: Any) -> PyTree:
    if reward.input_shapes is not None:
        prepared = reward.input_shapes(num_groups)
    else:
        prepared = reward.prepare({}, [Prompt("a cat", {})] * num_groups)
    return jax.tree.map(lambda a: _shape(tuple(np.shape(a)), where, a.dtype), prepared)


def _shape(shape: tuple[int, ...], where: Any, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _placed(leaf: Any, where: Any) -> Any:
    return _shape(leaf.shape, where, leaf.dtype)


def report(config: Config, topology: str) -> dict[str, Any]:
    """Compiles a config's train step for a topology and says what it costs a chip.

    Returns:
      What `python -m pec_jax.aot` prints, see there. Where the compiler finds that it does not fit,
      `fits` is False, `error` is what it said, and what only a compiled program tells is absent.

    Raises:
      ConfigError: see `compile_step` and `topology_devices`.
    """
    devices, chip = topology_devices(topology)
    start = time.perf_counter()
    result: dict[str, Any] = {"topology": topology, "chips": len(devices)}
    try:
        step = compile_step(config, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {
            "hbm_bytes": int(chip.hbm_bytes),
            "fits": False,
            "error": _first_lines(str(error)),
            "compile_seconds": time.perf_counter() - start,
        }
    return result | analyse(step, chip, len(devices)) | {"compile_seconds": step.seconds}


def analyse(step: CompiledStep, chip: Chip, num_chips: int) -> dict[str, Any]:
    """What a compiled step costs a chip; see `report`."""
    memory, arguments = step.executable.memory_analysis(), step.arguments
    resident = bytes_per_chip((arguments.state, arguments.frozen, arguments.batch))
    # Weights that the step does not read (those of an encoder of the evaluation) are no arguments
    # of it, but lie there all the same.
    unread = max(0, resident - memory.argument_size_in_bytes)
    peak = unread + (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    text = step.executable.as_text()
    found, expected = collectives(text), schedule(text, chip, step.flops / num_chips)
    cost = step.executable.cost_analysis() or {}
    bound = roofline(
        chip,
        step.flops / num_chips,
        float(cost.get("bytes accessed", 0.0)),
        sum(kind.bytes for kind in found.values()),
    )
    return {
        "parameters": {
            "total": _count(arguments.frozen.transformer["params"]),
            "trainable": _count(arguments.state.params),
        },
        "bytes_per_chip": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "unread": unread,
            "peak": peak,
        },
        "hbm_bytes": int(chip.hbm_bytes),
        "fits": peak <= chip.hbm_bytes,
        "flops": {"analytic": step.flops / num_chips, "xla": float(cost.get("flops", 0.0))},
        "collectives": {kind: value._asdict() for kind, value in found.items()},
        "roofline": bound._asdict(),
        "schedule": expected._asdict() if expected else None,
        "longest": dict(longest(text, chip, LONGEST)),
    }


def bytes_per_chip(tree: PyTree) -> int:
    """Bytes on one device of arrays, or of shapes with their places."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape, dtype=np.int64)) * jnp.dtype(leaf.dtype).itemsize
    return total


def _count(tree: PyTree) -> int:
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def _first_lines(text: str, lines: int = 12) -> str:
    return "\n".join(text.splitlines()[:lines])
