"""The policy update: from one rollout to new parameters.

A mini-batch is some images of every group, a micro-batch a few of those at one sampler step: so
every device has work in every piece, whatever groups it holds, and memory does not grow with the
number of images or of trained steps. What needs a whole group (means, stds, quantiles) is taken
from the rollout beforehand. Gradients are summed over the micro-batches in one `lax.scan`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pec_jax.data.stream import repeat_groups
from pec_jax.distributed.mesh import over_batch
from pec_jax.flow.sampler import step_log_prob
from pec_jax.flow.transition import gaussian_kl, policy_entropy
from pec_jax.rl.advantages import GroupStatistics, advantages, group_statistics, probabilities
from pec_jax.rl.constraints import constrained_loss
from pec_jax.rl.program import Frozen, Program, bind, constraint_options
from pec_jax.rl.signals import Groups, Signals, whole_groups
from pec_jax.types import Array, Batch, PyTree, Rollout, TrainState


def update(
    program: Program,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    experience: Rollout,
    key: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """The optimizer updates of one rollout: `epochs` passes over `minibatches` disjoint parts.

    `key` is for constraints that draw at random.

    The ratio at the first update is exactly 1: logp_old is that update's own logp, its gradient
    stopped. Later updates compare with logp_old recomputed here, by the update's own graph and
    before the first of them, for the rollout's graph rounds differently.

    Returns:
      The next state (unchanged parameters where a gradient was not finite), and scalars.
    """
    config = program.config.grpo
    constraint, options = program.constraint, constraint_options(program.config)
    signals = _whole_batch_signals(program, state, experience, key)
    shaped = constraint.shape_reward(signals, options)
    statistics = group_statistics(shaped, config.advantage_std)
    whole = advantages(shaped, statistics, clip=config.advantage_clip)
    selected = jnp.zeros(signals.logp.shape, bool)
    if constraint.select is not None:
        per_step = jnp.broadcast_to(whole, signals.logp.shape)
        selected = constraint.select(signals._replace(advantages=per_step), options)
    parts = _micro_batches(program, experience, selected)
    steps = _step_inputs(program, signals, statistics)
    logp_old = _old_log_probs(program, state.params, frozen, batch, parts, steps)

    def one_update(state, index):
        part, old = jax.tree.map(lambda a: a[index % config.minibatches], (parts, logp_old))
        return _one_update(program, state, frozen, batch, steps, part, old, index == 0)

    num_updates = config.minibatches * config.epochs
    state, aux = jax.lax.scan(one_update, state, jnp.arange(num_updates))
    weight = constraint.update_weight(signals, options)
    probs = probabilities(whole)
    metrics = {
        "advantage/prob_max": jnp.mean(jnp.max(probs, axis=-1)),
        "advantage/prob_min": jnp.mean(jnp.min(probs, axis=-1)),
        "constraint/weight": state.constraint_weight,
        "constraint/target": state.entropy_target,
        "constraint/bonus_mean": jnp.mean(shaped - experience.rewards),
        "constraint/loss": jnp.mean(aux["constraint_loss"]),
        "constraint/selected": jnp.mean(selected.astype(jnp.float32)),
        "policy/ratio_max_deviation": aux["ratio_max_deviation"][0],
        "policy/logp_drift": aux["logp_drift"][0],
        "policy/clip_fraction": jnp.mean(aux["clip_fraction"]),
        "policy/kl": jnp.mean(aux["kl"]),
        "policy/grad_norm": jnp.mean(aux["grad_norm"]),
        "policy/loss": jnp.mean(aux["loss"]),
        "policy/skipped": jnp.sum(aux["skipped"]).astype(jnp.float32),
        "policy/skipped_in_a_row": state.skipped.astype(jnp.float32),
    }
    return state.replace(step=state.step + 1, constraint_weight=weight), metrics


def _whole_batch_signals(
    program: Program, state: TrainState, experience: Rollout, key: Array
) -> Signals:
    """What is known before the first update: log-probs [S, P, K] are the rollout's own."""
    steps, shape = program.trained_steps, experience.rewards.shape
    signals = Signals(
        weight=state.constraint_weight,
        rewards=experience.rewards,
        surprisal=experience.surprisal,
        logp=experience.trajectory.logp[steps].reshape(len(steps), *shape),
        target=state.entropy_target,
        key=key,
    )
    return whole_groups(signals, constraint_options(program.config))


@struct.dataclass
class _Step:
    """What all micro-batches of a sampler step share."""

    sigma: Array  # [S]
    sigma_next: Array  # [S]
    groups: Groups  # [S, P, 1] each
    statistics: GroupStatistics  # [S, P, 1] each; the std [S, 1, 1] where it is global


@struct.dataclass
class _Micro:
    """Micro-batches: U mini-batches, S steps, C pieces of k images of every group."""

    x_t: Array  # [U, S, C, P, k, h, w, C']
    x_next: Array  # likewise
    logp_rollout: Array  # [U, S, C, P, k]
    rewards: Array  # [U, S, C, P, k]
    surprisal: Array  # [U, S, C, P, k]
    selected: Array  # [U, S, C, P, k] bool


def _step_inputs(program: Program, signals: Signals, statistics: GroupStatistics) -> _Step:
    steps = program.trained_steps

    def per_step(a):  # [P, 1] or [S, P, 1] -> [S, P, 1]
        return jnp.broadcast_to(a, (len(steps), *a.shape[-2:]))

    return _Step(
        sigma=jnp.asarray(program.sigmas[steps]),
        sigma_next=jnp.asarray(program.sigmas[steps + 1]),
        groups=jax.tree.map(per_step, signals.groups),
        statistics=jax.tree.map(per_step, statistics),
    )


def _micro_batches(program: Program, experience: Rollout, selected: Array) -> _Micro:
    config, steps = program.config, program.trained_steps
    num_groups, size = experience.rewards.shape
    num_parts = config.grpo.minibatches
    images = config.batch.update_images or size // num_parts

    def split(a):  # [S, P, K, ...] -> [U, S, C, P, k, ...]
        a = a.reshape(*a.shape[:2], num_parts, -1, images, *a.shape[3:])
        return over_batch(jnp.moveaxis(a, (2, 3), (0, 2)), axis=3)

    def taken(a):  # [T, P * K, ...]
        return split(a[steps].reshape(len(steps), num_groups, size, *a.shape[2:]))

    def shared(a):  # [P, K] or [S, P, K]
        return split(jnp.broadcast_to(a, (len(steps), num_groups, size)))

    trajectory = experience.trajectory
    return _Micro(
        x_t=taken(trajectory.x_t),
        x_next=taken(trajectory.x_next),
        logp_rollout=taken(trajectory.logp),
        rewards=shared(experience.rewards),
        surprisal=shared(experience.surprisal),
        selected=split(selected),
    )


def _pairs(steps: _Step, parts: PyTree) -> tuple[_Step, PyTree]:
    """Every step with each of its pieces: [S, ...] and [S, C, ...] -> [S * C, ...] both."""
    pieces = jax.tree.leaves(parts)[0].shape[1]
    repeated = jax.tree.map(lambda a: jnp.repeat(a, pieces, axis=0), steps)
    return repeated, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)


def _step_log_prob(
    program: Program, variables: PyTree, frozen: Frozen, batch: Batch, step: _Step, micro: _Micro
):
    """(logp [P, k], mean, std) of one micro-batch under `variables`."""
    sampler, (num_groups, images) = program.config.sampler, micro.rewards.shape
    flat = num_groups * images, *program.latent_shape
    logp, mean, std = step_log_prob(
        program.guide(sampler.guidance, frozen.negative),
        variables,
        over_batch(micro.x_t.reshape(flat)),
        over_batch(micro.x_next.reshape(flat)),
        step.sigma,
        step.sigma_next,
        over_batch(repeat_groups(batch.conditioning, images)),
        kernel=sampler.kernel,
        noise_level=sampler.noise_level,
        sigma_max=program.sigmas[1],
    )
    return logp.reshape(num_groups, images), mean, std


def _old_log_probs(
    program: Program, params: PyTree, frozen: Frozen, batch: Batch, parts: _Micro, steps: _Step
) -> Array:
    """logp [U, S, C, P, k] of the taken steps under the policy before the first update.

    The first update takes its own; only a further epoch reads mini-batch 0's from here. In a single
    epoch it is left at 0, which saves 1 / U of these forward passes.
    """
    first = 0 if program.config.grpo.epochs > 1 else 1
    variables = bind(program.config.trainable, params, frozen.transformer)

    def of_piece(pair):
        return _step_log_prob(program, variables, frozen, batch, *pair)[0]

    def of_part(part):
        return jax.lax.map(of_piece, _pairs(steps, part)).reshape(part.rewards.shape)

    logp = jnp.zeros(parts.rewards.shape)
    later = jax.tree.map(lambda a: a[first:], parts)
    return logp.at[first:].set(jax.lax.map(of_part, later)) if len(later.rewards) else logp


def _loss(
    params: PyTree,
    program: Program,
    frozen: Frozen,
    batch: Batch,
    step: _Step,
    micro: _Micro,
    logp_old: Array,
    first: Array,
    weight: Array,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one micro-batch, and what to log of it."""
    config, constraint = program.config, program.constraint
    options = constraint_options(config)
    variables = bind(program.config.trainable, params, frozen.transformer)
    logp, mean, std = _step_log_prob(program, variables, frozen, batch, step, micro)
    fresh = jax.lax.stop_gradient(logp)
    logp_old = jnp.where(first, fresh, logp_old)
    kl = None
    if constraint.needs_reference:
        reference = jax.lax.stop_gradient(
            _step_log_prob(program, frozen.transformer, frozen, batch, step, micro)[1]
        )
        dt = step.sigma_next - step.sigma if config.grpo.kl_form == "flow_grpo" else None
        kl = gaussian_kl(mean, reference, std, dt).reshape(logp.shape)
    signals = Signals(
        weight=weight,
        rewards=micro.rewards,
        surprisal=micro.surprisal,
        logp=logp,
        logp_old=logp_old,
        ratio=jnp.exp(fresh - logp_old),
        kl=kl,
        entropy=jnp.mean(policy_entropy(std)),
        selected=micro.selected,
        groups=step.groups,
    )
    shaped = constraint.shape_reward(signals, options)
    signals = signals._replace(
        advantages=advantages(shaped, step.statistics, clip=config.grpo.advantage_clip)
    )
    loss, aux = constrained_loss(
        constraint, signals, options, config.grpo.clip_low, config.grpo.clip_high
    )
    aux["logp_drift"] = jnp.max(jnp.abs(fresh - micro.logp_rollout))
    aux["kl"] = jnp.float32(0.0) if kl is None else jax.lax.stop_gradient(jnp.mean(kl))
    return loss, {**aux, "loss": loss}


def _one_update(
    program: Program,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    steps: _Step,
    parts: _Micro,
    logp_old: Array,
    first: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """Gradients summed over the micro-batches [S, C] of one mini-batch, and one optimizer step."""
    pairs = _pairs(steps, (parts, logp_old))
    count = logp_old.shape[0] * logp_old.shape[1]
    grad_fn = jax.grad(_loss, has_aux=True)

    def accumulate(total, pair):
        step, (micro, old) = pair
        grads, aux = grad_fn(
            state.params,
            program,
            frozen,
            batch,
            step,
            micro,
            old,
            first,
            state.constraint_weight,
        )
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype) / count, total, grads), aux

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, aux = jax.lax.scan(accumulate, zeros, pairs)
    aux = {
        name: jnp.max(a) if name in ("ratio_max_deviation", "logp_drift") else jnp.mean(a)
        for name, a in aux.items()
    }
    norm = optax.global_norm(grads)
    state = _apply(program, state, grads, jnp.isfinite(norm) & jnp.isfinite(aux["loss"]))
    return state, {**aux, "grad_norm": norm, "skipped": state.skipped > 0}


def _apply(program: Program, state: TrainState, grads: PyTree, finite: Array) -> TrainState:
    """One optimizer step and its EMA; where a number is not finite, the old state, counted."""
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - program.config.optimizer.ema_decay)

    def keep_old(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    return state.replace(
        params=keep_old(params, state.params),
        ema=keep_old(ema, state.ema),
        opt_state=keep_old(opt_state, state.opt_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
