"""THE train step: sample -> score -> update.

`train_step(program, state, frozen, batch, key) -> (state, metrics)` is compiled once. It is
composed of `rollout`, `score` and `update`, which are public, pure and tested by themselves; of
`score` the part that looks at single images runs between the rollout's chunks.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pec_jax.flow.transition import policy_entropy
from pec_jax.rl.advantages import known_mean
from pec_jax.rl.composition import Constraints
from pec_jax.rl.objective import Objective
from pec_jax.rl.rollout import Drawing, rollout_and
from pec_jax.rl.score import Scorer, conclude, look
from pec_jax.rl.update import Learner, update
from pec_jax.types import Batch, Frozen, PyTree, Rollout, TrainState

# Folded into the run's key, where every iteration folds its number, from 0 on.
WINDOW = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Program:
    """The static half of a train step: one part for each of its three stages."""

    drawing: Drawing
    scorer: Scorer
    learner: Learner

    def initial_state(self, params: PyTree) -> TrainState:
        """The state of a run that has not begun, given what learns."""
        learner = self.learner
        return initial_state(params, learner.optimizer, learner.objective, learner.constraints)

    def at(self, iteration: Array, key: Array) -> Program:
        """The program of an iteration, counted from 0: a window of trained steps may move."""
        policy = self.learner.policy.at(iteration, key)
        if policy is self.learner.policy:
            return self
        return dataclasses.replace(
            self,
            drawing=dataclasses.replace(self.drawing, policy=policy),
            learner=dataclasses.replace(self.learner, policy=policy),
        )


def train_step(
    program: Program, state: TrainState, frozen: Frozen, batch: Batch, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One iteration: K images of each of P prompts, and the updates they give rise to.

    Args:
        program: static.
        state: donated when compiled.
        frozen: everything that does not learn.
        batch: the P prompts.
        key: the run's key; the iteration's is folded from it and `state.step`.

    Returns:
        The next state, and scalars named as in the metric files.
    """
    program = program.at(state.step, jax.random.fold_in(key, WINDOW))
    key = jax.random.fold_in(key, state.step)
    params = program.learner.objective.rollout_params(state)
    experience, metrics = experienced(program, params, (frozen, batch), key)
    state, more = update(
        program.learner, state, (frozen, batch), experience, jax.random.fold_in(key, 2)
    )
    return state, {**metrics, **more}


def experienced(
    program: Program, params: PyTree, inputs: tuple[Frozen, Batch], key: Array
) -> tuple[Rollout, dict[str, Array]]:
    """A rollout under `params`, scored, and its metrics."""
    look_at = functools.partial(look, program.scorer, inputs)
    trajectory, seen = rollout_and(program.drawing, params, inputs, key, look_at)
    found, metrics = conclude(program.scorer, inputs, trajectory, seen)
    return found, {**metrics, **_entropy_metrics(program, found)}


def base_entropy(
    program: Program, params: PyTree, frozen: Frozen, batch: Batch, key: Array
) -> Array:
    """H_perc [] of one batch of prompts under the policy, as a constraint measures it."""
    found, _ = experienced(program, params, (frozen, batch), key)
    return known_mean(found.surprisal)


def initial_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    constraints: Constraints,
) -> TrainState:
    """The state of a run that has not begun; copies, for the step takes its buffers over."""

    def copy(tree):
        return jax.tree.map(jnp.copy, tree)

    params = copy(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=copy(params),
        opt_state=optimizer.init(params),
        objective=copy(objective.initial_state(params)),
        constraints=constraints.initial_states(),
        skipped=jnp.zeros((), jnp.int32),
    )


def _entropy_metrics(program: Program, found: Rollout) -> dict[str, Array]:
    """The policy's entropy, analytic and measured; nothing where its steps have no noise."""
    sampler, logp = program.learner.policy.sampler, found.trajectory.logp
    if logp is None:
        return {}
    return {
        "entropy/policy": jnp.mean(policy_entropy(sampler.step_std())),
        "entropy/policy_mc": -jnp.mean(logp[sampler.trained_steps]),
    }
