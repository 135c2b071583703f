"""The train step and its phases as compiled functions of no arguments."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from pec_jax.rl.program import Frozen, Program, initial_state

from benchmarks.setups import Setup, as_compiled
from benchmarks.timing import Contestant, compiled_memory
from pec_jax.distributed import mesh as sharding
from pec_jax.profiling import flops
from pec_jax.rl.train_step import (
    decode,
    image_features,
    map_images,
    rollout,
    score,
    step_surprisal,
    train_step,
)
from pec_jax.rl.update import update
from pec_jax.types import Array, Batch, PyTree, TrainState, Trajectory


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Something compiled, its arguments bound, that has run once."""

    run: Contestant
    flops: int  # over all devices together
    compile_s: float
    memory_gib: float | None  # of one device, by the compiler
    output: Any = None  # of the first run, where it is an input of what follows


def whole_step(setup: Setup) -> Compiled:
    """The train step as a run has it: one program, whose state is donated to the next call."""
    step = jax.jit(
        functools.partial(train_step, setup.program),
        donate_argnums=0,
        out_shardings=(setup.shardings, sharding.replicated(setup.mesh)),
    )
    return _stateful(step, train_step, setup, setup.frozen, setup.batch, setup.key)


def phases(setup: Setup) -> dict[str, Compiled]:
    """The phases of the step, each compiled by itself; what they give is the next one's input.

    rollout: P * K paths of T steps. decode: latents to images. score: rewards. entropy: the
    features of encoders that are not a reward's, and the estimator; features that a reward has
    computed already are given. update: all updates of the iteration.
    """
    program, frozen, batch = setup.program, setup.frozen, setup.batch
    state = _first_state(setup)
    found = {"rollout": _pure(setup, rollout, state.params, frozen, batch, setup.key)}
    trajectory = found["rollout"].output
    found["decode"] = _pure(setup, decode_all, frozen, trajectory)
    images = found["decode"].output
    found["score"] = _pure(setup, score_all, frozen, batch, images)
    given = _pure(setup, shared_features, frozen, images).output
    found["entropy"] = _pure(setup, entropy, frozen, images, given, trajectory)
    experience = _pure(setup, score, frozen, batch, trajectory).output
    step = jax.jit(functools.partial(update, program), donate_argnums=0)
    found["update"] = _stateful(step, update, setup, frozen, batch, experience, setup.key)
    return found


def decode_all(program: Program, frozen: Frozen, trajectory: Trajectory) -> Array:
    """Images [P, K, H, W, 3] of the final latents, some of every group at a time."""
    batch = program.config.batch
    x_0 = trajectory.x_0.reshape(-1, batch.group_size, *program.latent_shape)
    return map_images(lambda part: decode(program, frozen, part), x_0, batch.decode_images)


def score_all(program: Program, frozen: Frozen, batch: Batch, images: Array) -> Array:
    """Rewards [P, K] of images [P, K, H, W, 3], some of every group at a time."""
    params = frozen.reward_params(program.reward_encoder)
    return map_images(
        lambda part: program.reward.score(params, part, batch.reward_inputs)[0],
        images,
        program.config.batch.decode_images,
    )


def entropy(
    program: Program,
    frozen: Frozen,
    images: Array,
    given: dict[str, Array],
    trajectory: Trajectory,
) -> Array:
    """Surprisals of images [P, K, H, W, 3], or of each step's prediction where perception is there.

    `given` holds the features that the rewards have computed, {encoder: [P, K, d]}.
    """
    if program.config.perception.at == "steps":
        return step_surprisal(program, frozen, trajectory, images.shape[0])
    rest = {name: share for name, share in program.spaces.items() if name not in given}
    features = _features_of(dataclasses.replace(program, spaces=rest), frozen, images)
    return program.surprisal({**features, **given})


def shared_features(program: Program, frozen: Frozen, images: Array) -> dict[str, Array]:
    """Features {encoder: [P, K, d]} of the encoders that perception shares with a reward."""
    rewards = program.reward_encoder.values()
    shared = {name: share for name, share in program.spaces.items() if name in rewards}
    return _features_of(dataclasses.replace(program, spaces=shared), frozen, images)


def _features_of(program: Program, frozen: Frozen, images: Array) -> dict[str, Array]:
    if not program.spaces:
        return {}
    return map_images(
        lambda part: image_features(program, frozen, part),
        images,
        program.config.batch.decode_images,
    )


def _first_state(setup: Setup) -> TrainState:
    """A state of its own, for a contestant may donate it."""
    make = functools.partial(
        initial_state,
        optimizer=setup.program.optimizer,
        constraint_weight=setup.config.constraint.weight,
    )
    return jax.jit(make, out_shardings=setup.shardings)(setup.params)


def _stateful(step: Any, function: Callable, setup: Setup, *rest: PyTree) -> Compiled:
    """A compiled (state, ...) -> (state, metrics) that goes on from where it stands."""
    state = _first_state(setup)
    count = flops.count(functools.partial(function, as_compiled(setup.program)), state, *rest)
    executable, seconds = _compile(setup, step, state, *rest)
    holder = [state]
    del state  # its buffers are given away below

    def run() -> None:
        holder[0], metrics = executable(holder[0], *rest)
        jax.block_until_ready((holder[0], metrics))

    run()
    return Compiled(run, count, seconds, compiled_memory(executable))


def _pure(setup: Setup, function: Callable, *arguments: PyTree) -> Compiled:
    """A compiled function of the program and of arguments that stay."""
    count = flops.count(functools.partial(function, as_compiled(setup.program)), *arguments)
    step = jax.jit(functools.partial(function, setup.program))
    executable, seconds = _compile(setup, step, *arguments)

    def run() -> None:
        jax.block_until_ready(executable(*arguments))

    output = jax.block_until_ready(executable(*arguments))
    return Compiled(run, count, seconds, compiled_memory(executable), output)


def _compile(setup: Setup, step: Any, *arguments: PyTree) -> tuple[Any, float]:
    start = time.perf_counter()
    with sharding.active(setup.mesh, setup.config):
        executable = step.lower(*arguments).compile()
    return executable, time.perf_counter() - start
