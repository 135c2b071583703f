"""The policy update: from one rollout to new parameters.

A mini-batch is some images of every group, a micro-batch a few of those at one sampler step: so
every device has work in every piece, whatever groups it holds, and memory does not grow with the
number of images or of trained steps. What needs a whole group (means, stds, quantiles) is taken
from the rollout beforehand. Gradients are summed over the micro-batches in one `lax.scan`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from pec_jax.config.schema import UpdatesConfig
from pec_jax.data.stream import repeat_groups
from pec_jax.distributed.mesh import over_batch
from pec_jax.rl.advantages import GroupStatistics, advantages, group_statistics, probabilities
from pec_jax.rl.average import Average
from pec_jax.rl.composition import Constraints, States
from pec_jax.rl.objective import Micro, Objective, Samples
from pec_jax.rl.policy import Actor, Policy
from pec_jax.rl.signals import Groups, Signals, sample_mean, whole_groups
from pec_jax.types import Batch, Frozen, PyTree, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class Learner:
    """The static half of an update.

    Attributes:
        policy: what learns.
        objective: what its loss is.
        constraints: what keeps its images diverse.
        optimizer: how parameters move.
        config: mini-batches, epochs, advantages.
        update_images: of every group, in one forward and backward pass; 0 is a whole mini-batch.
        average: of the parameters.
    """

    policy: Policy
    objective: Objective
    constraints: Constraints
    optimizer: optax.GradientTransformation
    config: UpdatesConfig
    update_images: int
    average: Average


@struct.dataclass
class _Whole:
    """What is known of the whole batch before the first update."""

    signals: Signals  # [P, K] and [S, P, K]
    statistics: GroupStatistics
    advantages: Array  # [P, K] or [S, P, K]
    selected: dict[str, Array]  # constraint -> [S, P, K] bool


@struct.dataclass
class _Step:
    """What all micro-batches of a step share; [S, ...], then of one step."""

    inputs: PyTree
    groups: Groups  # [S, P, 1] each
    statistics: GroupStatistics  # [S, P, 1] each; the std [S, 1, 1] where it is global


@struct.dataclass
class _Part:
    """Micro-batches: U mini-batches, S steps, C pieces of k images of every group."""

    taken: PyTree  # [U, S, C, P, k, ...]
    rewards: Array  # [U, S, C, P, k]
    surprisal: Array  # [U, S, C, P, k]
    kept: Array  # [U, S, C, P, k] fp32, 0 where a sample leaves the means
    selected: dict[str, Array]  # [U, S, C, P, k] bool
    images: PyTree  # [U, C, P, k, ...]


@dataclasses.dataclass(frozen=True)
class _Scene:
    """What all micro-batches of a rollout share; traced arrays and static parts alike."""

    learner: Learner
    frozen: Frozen
    batch: Batch
    state: TrainState  # as before the first update; its parameters are not read here

    def actor(self, images: int) -> Actor:
        """The policy before the prompts of some images of every group."""
        conditioning = over_batch(repeat_groups(self.batch.conditioning, images))
        return self.learner.policy.before(self.frozen, conditioning)


def update(
    learner: Learner, state: TrainState, inputs: tuple[Frozen, Batch], rollout: Rollout, key: Array
) -> tuple[TrainState, dict[str, Array]]:
    """The optimizer updates of one rollout: `epochs` passes over `minibatches` disjoint parts.

    Args:
        learner: static.
        state: before them.
        inputs: all that does not learn, and the prompts.
        rollout: whole groups.
        key: for objectives and constraints that draw at random.

    Returns:
        The next state (unchanged parameters where a gradient was not finite), and scalars.
    """
    config, constraints = learner.config, learner.constraints
    scene = _Scene(learner, *inputs, state)
    rollout = _finite_paths(rollout)
    samples = learner.objective.samples(learner.policy, rollout, key)
    whole = _whole_batch(scene, samples, rollout, key)
    steps, parts = _step_inputs(samples, whole), _split(learner, samples, whole)
    old = _old_policy(scene, steps, parts)

    num_updates = config.minibatches * config.epochs

    def one_update(state, index):
        part, of_old = jax.tree.map(lambda a: a[index % config.minibatches], (parts, old))
        return _one_update(scene, state, (steps, part, of_old), index)

    state, aux = jax.lax.scan(one_update, state, jnp.arange(num_updates))
    states = constraints.next_states(state.constraints, rollout.surprisal)
    probs = probabilities(whole.advantages)
    first = learner.objective.metrics_of_first
    metrics = {
        "advantage/prob_max": jnp.mean(jnp.max(probs, axis=-1)),
        "advantage/prob_min": jnp.mean(jnp.min(probs, axis=-1)),
        **constraints.metrics(state.constraints, whole.signals, whole.selected),
        **{k: a[0] if k.rpartition("/")[-1] in first else jnp.mean(a) for k, a in aux.items()},
        "policy/skipped": jnp.sum(aux["policy/skipped"]).astype(jnp.float32),
        "policy/skipped_in_a_row": state.skipped.astype(jnp.float32),
    }
    step = state.step + 1
    remembered = learner.objective.next_state(state.objective, state.params, step * num_updates)
    state = dataclasses.replace(state, step=step, constraints=states, objective=remembered)
    return state, metrics


def _whole_batch(scene: _Scene, samples: Samples, rollout: Rollout, key: Array) -> _Whole:
    learner, states = scene.learner, scene.state.constraints
    logp = samples.taken.get("logp")  # the rollout's own
    if logp is not None:
        logp = logp.reshape(len(logp), *rollout.rewards.shape)
    groups = whole_groups(rollout.rewards, rollout.surprisal, logp)
    signals = Signals(rollout.rewards, rollout.surprisal, groups, logp=logp)
    shaped = learner.constraints.shaped_rewards(states, signals)
    statistics = group_statistics(shaped, learner.config.advantage_std)
    whole = advantages(shaped, statistics, clip=learner.config.advantage_clip)
    num_steps = len(jax.tree.leaves(samples.steps)[0])
    per_step = jnp.broadcast_to(whole, (num_steps, *whole.shape[-2:]))
    selected = learner.constraints.select(signals._replace(advantages=per_step), key)
    return _Whole(signals, statistics, whole, selected)


def _step_inputs(samples: Samples, whole: _Whole) -> _Step:
    num_steps = len(jax.tree.leaves(samples.steps)[0])

    def per_step(a):  # [P, 1] or [S, P, 1] -> [S, P, 1]
        return jnp.broadcast_to(a, (num_steps, *a.shape[-2:]))

    return _Step(
        inputs=samples.steps,
        groups=jax.tree.map(per_step, whole.signals.groups),
        statistics=jax.tree.map(per_step, whole.statistics),
    )


def _split(learner: Learner, samples: Samples, whole: _Whole) -> _Part:
    num_steps = len(jax.tree.leaves(samples.steps)[0])
    num_groups, size = whole.signals.rewards.shape
    num_parts = learner.config.minibatches
    images = learner.update_images or size // num_parts

    def split(a):  # [S, P, K, ...] -> [U, S, C, P, k, ...]
        a = a.reshape(*a.shape[:2], num_parts, -1, images, *a.shape[3:])
        return over_batch(jnp.moveaxis(a, (2, 3), (0, 2)), axis=3)

    def taken(a):  # [S, P * K, ...]
        return split(a.reshape(len(a), num_groups, size, *a.shape[2:]))

    def shared(a):  # [P, K] or [S, P, K]
        return split(jnp.broadcast_to(a, (num_steps, num_groups, size)))

    def of_images(a):  # [P * K, ...] -> [U, C, P, k, ...]
        return taken(a[None])[:, 0]

    kept = jnp.any(whole.advantages.reshape(-1, num_groups, size) != 0, axis=0)
    return _Part(
        taken=jax.tree.map(taken, samples.taken),
        rewards=shared(whole.signals.rewards),
        surprisal=shared(whole.signals.surprisal),
        kept=shared(kept.astype(jnp.float32)),
        selected={name: split(marked) for name, marked in whole.selected.items()},
        images=jax.tree.map(of_images, samples.images),
    )


def _pairs(steps: _Step, part: _Part, old: PyTree) -> tuple[PyTree, PyTree]:
    """Every step with each of its pieces: [S, ...] and [S, C, ...] -> [S * C, ...] both."""
    num_steps, pieces = part.rewards.shape[:2]
    repeated = jax.tree.map(lambda a: jnp.repeat(a, pieces, axis=0), steps)
    joined = jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[2:]),
        (part.taken, part.rewards, part.surprisal, part.kept, part.selected, old),
    )
    return (repeated, joined), jnp.tile(jnp.arange(pieces), num_steps)


def _micro(step: _Step, taken: PyTree, images: PyTree, rewards: Array, old_first: tuple) -> Micro:
    def flat(a):  # [P, k, ...] -> [P * k, ...]
        return over_batch(a.reshape(-1, *a.shape[2:]))

    return Micro(
        step=step.inputs,
        taken=jax.tree.map(flat, taken),
        images=jax.tree.map(flat, images),
        rewards=rewards,
        old=old_first[0],
        first=old_first[1],
    )


def _old_policy(scene: _Scene, steps: _Step, parts: _Part) -> PyTree:
    """What `Objective.prepare` says [U, S, C, P, k, ...] of the policy before the first update.

    The first update needs none; only a further epoch reads mini-batch 0's from here. In a single
    epoch it is left at 0, which saves 1 / U of these forward passes.
    """
    learner = scene.learner
    first = 0 if learner.config.epochs > 1 else 1

    def of_piece(part, pair):
        (step, (taken, rewards, *_)), piece = pair
        images = jax.tree.map(lambda a: a[piece], part.images)
        micro = _micro(step, taken, images, rewards, ((), jnp.bool_(False)))
        actor = scene.actor(rewards.shape[1])
        return learner.objective.prepare(actor, scene.state.params, micro)

    def of_part(part):
        found = jax.lax.map(lambda pair: of_piece(part, pair), _pairs(steps, part, ()))
        return jax.tree.map(lambda a: a.reshape(*part.rewards.shape[:2], *a.shape[1:]), found)

    def of_parts(parts):
        return jax.lax.map(of_part, parts)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of_parts, parts))
    later = jax.tree.map(lambda a: a[first:], parts)
    if not len(later.rewards):
        return zeros
    return jax.tree.map(lambda z, a: z.at[first:].set(a), zeros, of_parts(later))


def _finite_paths(rollout: Rollout) -> Rollout:
    """Paths without what is not finite: those images have no reward, hence no advantage, and must
    not spoil the sums that they add 0 to.
    """
    path = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), rollout.trajectory)
    return dataclasses.replace(rollout, trajectory=path)


def _one_update(
    scene: _Scene, state: TrainState, pieces: tuple[_Step, _Part, PyTree], index: Array
) -> tuple[TrainState, dict[str, Array]]:
    """Gradients summed over the micro-batches [S, C] of one mini-batch, and one optimizer step.

    `index` counts the rollout's updates from 0.
    """
    steps, part, old = pieces
    config = scene.learner.config
    if config.drop_zero_advantages:
        weight = part.kept / jnp.maximum(jnp.mean(part.kept), 1e-12)
        part = dataclasses.replace(part, kept=weight)
    pairs = _pairs(steps, part, old)
    count = part.rewards.shape[0] * part.rewards.shape[1]
    grad_fn = jax.grad(_loss, has_aux=True)

    def accumulate(total, pair):
        (step, joined), piece = pair
        images = jax.tree.map(lambda a: a[piece], part.images)
        grads, aux = grad_fn(state.params, scene, step, (*joined, images), index == 0)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype) / count, total, grads), aux

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, aux = jax.lax.scan(accumulate, zeros, pairs)
    maxima = scene.learner.objective.metrics_of_first
    aux = {
        name: jnp.max(a) if name.rpartition("/")[-1] in maxima else jnp.mean(a)
        for name, a in aux.items()
    }
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(aux["policy/loss"])
    updates = state.step * config.minibatches * config.epochs + index + 1
    state = _apply(scene.learner, state, (grads, finite), updates)
    return state, {**aux, "policy/grad_norm": norm, "policy/skipped": state.skipped > 0}


def _loss(
    params: PyTree, scene: _Scene, step: _Step, piece: tuple, first: Array
) -> tuple[Array, dict[str, Array]]:
    """The loss of one micro-batch, and what to log of it."""
    taken, rewards, surprisal, kept, selected, old, images = piece
    learner, states = scene.learner, scene.state.constraints
    objective, constraints = learner.objective, learner.constraints
    micro = _micro(step, taken, images, rewards, (old, first))
    known, view, metrics = objective.evaluate(
        scene.actor(rewards.shape[1]), params, micro, scene.state.objective, constraints.needs
    )
    weight = kept if learner.config.drop_zero_advantages else None
    signals = Signals(rewards, surprisal, step.groups, weight=weight, **known)
    shaped = constraints.shaped_rewards(states, signals)
    worth = advantages(shaped, step.statistics, clip=learner.config.advantage_clip)
    signals = signals._replace(advantages=worth)
    loss, more = constrained_loss((objective, constraints), (states, selected), view, signals)
    return loss, {f"policy/{name}": value for name, value in metrics.items()} | more


def constrained_loss(
    methods: tuple[Objective, Constraints],
    known: tuple[States, dict[str, Array]],
    view: PyTree,
    signals: Signals,
) -> tuple[Array, dict[str, Array]]:
    """The objective's loss as the constraints leave it, and what to log of it.

    Args:
        methods: what the loss is, and what is on.
        known: the constraints' states, and what they marked of these samples.
        view: of the samples, from `Objective.evaluate`.
        signals: of them, with the advantages.
    """
    (objective, constraints), (states, selected) = methods, known
    losses, metrics = objective.losses(view, signals, constraints.clip_bounds)
    losses = constraints.sample_losses(states, signals, losses, selected)
    extra = constraints.extra_losses(states, signals)
    loss = sum(extra.values(), sample_mean(signals, losses))
    return loss, {
        **{f"policy/{name}": value for name, value in {**metrics, "loss": loss}.items()},
        **{f"constraint/{k}/loss": jax.lax.stop_gradient(value) for k, value in extra.items()},
    }


def _apply(
    learner: Learner, state: TrainState, step: tuple[PyTree, Array], updates: Array
) -> TrainState:
    """One optimizer step and its average; where a number is not finite, the old state, counted.

    Args:
        learner: static.
        state: before the step.
        step: the gradients, and whether they are finite.
        updates: all so far, this one included.
    """
    grads, finite = step
    changes, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    ema = learner.average.moved(state.ema, params, updates)

    def keep_old(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    return dataclasses.replace(
        state,
        params=keep_old(params, state.params),
        ema=keep_old(ema, state.ema),
        opt_state=keep_old(opt_state, state.opt_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
