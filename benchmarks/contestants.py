"""The train step and its phases as compiled functions of no arguments."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.setups import Setup, as_compiled, shared_spaces
from benchmarks.timing import Contestant, compiled_memory, library_kernels
from pec_jax.distributed import mesh as sharding
from pec_jax.profiling import flops
from pec_jax.rl.rollout import map_images, rollout
from pec_jax.rl.score import decode, score, step_surprisal
from pec_jax.rl.train_step import Program, train_step
from pec_jax.rl.update import update
from pec_jax.types import Array, Batch, Frozen, PyTree, Rollout, TrainState, Trajectory


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Something compiled, its arguments bound, that has run once."""

    run: Contestant
    flops: int  # over all devices together
    compile_s: float
    memory_gib: float | None  # of one device, by the compiler
    kernels: dict[str, int]  # of libraries, how often each stands in the program
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
    frozen, batch = setup.frozen, setup.batch
    state = _first_state(setup)
    found = {"rollout": _pure(setup, draw_all, state.params, (frozen, batch), setup.key)}
    trajectory = found["rollout"].output
    found["decode"] = _pure(setup, decode_all, frozen, trajectory)
    images = found["decode"].output
    found["score"] = _pure(setup, reward_all, (frozen, batch), images)
    given = _pure(setup, shared_features, frozen, images).output
    found["entropy"] = _pure(setup, entropy, frozen, images, given, trajectory)
    experience = _pure(setup, score_all, (frozen, batch), trajectory).output
    step = jax.jit(functools.partial(update_all, setup.program), donate_argnums=0)
    found["update"] = _stateful(step, update_all, setup, (frozen, batch), experience, setup.key)
    return found


def draw_all(
    program: Program, params: PyTree, inputs: tuple[Frozen, Batch], key: Array
) -> Trajectory:
    """The paths of all images."""
    return rollout(program.drawing, params, inputs, key)


def decode_all(program: Program, frozen: Frozen, trajectory: Trajectory) -> Array:
    """Images [P, K, H, W, 3] of the final latents, some of every group at a time."""
    latents = trajectory.x_0
    x_0 = latents.reshape(-1, program.drawing.group_size, *latents.shape[1:])
    scorer = program.scorer
    return map_images(lambda part: decode(scorer, frozen, part), x_0, scorer.images)


def reward_all(program: Program, inputs: tuple[Frozen, Batch], images: Array) -> Array:
    """Rewards [P, K] of images [P, K, H, W, 3], some of every group at a time."""
    (frozen, batch), scorer = inputs, program.scorer
    return map_images(
        lambda part: scorer.reward.score(frozen.networks, part, batch.reward_inputs)[0],
        images,
        scorer.images,
    )


def score_all(program: Program, inputs: tuple[Frozen, Batch], trajectory: Trajectory) -> Rollout:
    """All that an update must know of the paths."""
    return score(program.scorer, inputs, trajectory, program.drawing.group_size)[0]


def update_all(
    program: Program,
    state: TrainState,
    inputs: tuple[Frozen, Batch],
    experience: Rollout,
    key: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """All updates of the iteration."""
    return update(program.learner, state, inputs, experience, key)


def entropy(
    program: Program,
    frozen: Frozen,
    images: Array,
    given: dict[str, Array],
    trajectory: Trajectory,
) -> Array:
    """Surprisals of images [P, K, H, W, 3], or of each step's prediction where perception is there.

    `given` holds the features that the rewards have computed, {space: [P, K, d]}.
    """
    scorer = program.scorer
    if scorer.at_steps is not None:
        return step_surprisal(scorer, frozen, trajectory, program.drawing.group_size)
    rest = _features(program, frozen, images, set(scorer.spaces) - set(given))
    return scorer.surprisal({**rest, **given})


def shared_features(program: Program, frozen: Frozen, images: Array) -> dict[str, Array]:
    """Features {space: [P, K, d]} of the encoders that perception shares with a reward."""
    return _features(program, frozen, images, shared_spaces(program))


def _features(program: Program, frozen: Frozen, images: Array, names: set[str]) -> dict[str, Array]:
    spaces = {name: space for name, space in program.scorer.spaces.items() if name in names}
    if not spaces:
        return {}
    return map_images(
        lambda part: {name: space.of_images(frozen, part) for name, space in spaces.items()},
        images,
        program.scorer.images,
    )


def _first_state(setup: Setup) -> TrainState:
    """A state of its own, for a contestant may donate it."""
    return jax.jit(setup.program.initial_state, out_shardings=setup.shardings)(setup.params)


def _stateful(step: Any, function: Callable, setup: Setup, *rest: PyTree) -> Compiled:
    """A compiled (state, ...) -> (state, metrics) that goes on from where it stands."""
    state = _first_state(setup)
    count = _flops(setup, function, state, *rest)
    executable, seconds = _compile(setup, step, state, *rest)
    holder = [state]
    del state  # its buffers are given away below

    def run() -> None:
        holder[0], metrics = executable(holder[0], *rest)
        jax.block_until_ready((holder[0], metrics))

    run()
    return Compiled(run, count, seconds, compiled_memory(executable), library_kernels(executable))


def _pure(setup: Setup, function: Callable, *arguments: PyTree) -> Compiled:
    """A compiled function of the program and of arguments that stay."""
    count = _flops(setup, function, *arguments)
    step = jax.jit(functools.partial(function, setup.program))
    executable, seconds = _compile(setup, step, *arguments)

    def run() -> None:
        jax.block_until_ready(executable(*arguments))

    output = jax.block_until_ready(executable(*arguments))
    kernels = library_kernels(executable)
    return Compiled(run, count, seconds, compiled_memory(executable), kernels, output)


def _flops(setup: Setup, function: Callable, *arguments: PyTree) -> int:
    with sharding.active(setup.mesh, setup.config):
        return flops.count(functools.partial(function, as_compiled(setup.program)), *arguments)


def _compile(setup: Setup, step: Any, *arguments: PyTree) -> tuple[Any, float]:
    start = time.perf_counter()
    with sharding.active(setup.mesh, setup.config):
        executable = step.lower(*arguments).compile()
    return executable, time.perf_counter() - start
