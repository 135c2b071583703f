"""The policy update: from one rollout to new parameters.

Micro-batches are single sampler steps of some whole groups; their gradients are summed in one
`lax.scan`, so that memory does not grow with the number of trained steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pec_jax.data.pipeline import repeat_groups
from pec_jax.flow.sampler import step_log_prob
from pec_jax.flow.transition import gaussian_kl, policy_entropy
from pec_jax.grpo.advantage import group_advantages, probabilities
from pec_jax.grpo.constraints import constrained_loss
from pec_jax.grpo.signals import Signals
from pec_jax.program import Frozen, Program, bind, constraint_options
from pec_jax.types import Array, Batch, Conditioning, PyTree, Rollout, TrainState


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
    advantages = _advantages(program, shaped, None)
    selected = jnp.zeros(signals.logp.shape, bool)
    if constraint.select is not None:
        per_step = jnp.broadcast_to(advantages, signals.logp.shape)
        selected = constraint.select(signals._replace(advantages=per_step), options)
    parts = _micro_batches(program, batch, experience, selected, jnp.std(shaped, axis=(-2, -1)))
    num_updates = config.minibatches * config.epochs
    logp_old = _old_log_probs(program, state.params, frozen, parts)

    def one_update(state, index):
        def pick(tree):
            return jax.tree.map(lambda a: a[index % config.minibatches], tree)

        return _one_update(program, state, frozen, pick(parts), pick(logp_old), index == 0)

    state, aux = jax.lax.scan(one_update, state, jnp.arange(num_updates))
    weight = constraint.update_weight(signals, options)
    probs = probabilities(advantages)
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
    return Signals(
        weight=state.constraint_weight,
        rewards=experience.rewards,
        surprisal=experience.surprisal,
        logp=experience.trajectory.logp[steps].reshape(len(steps), *shape),
        target=state.entropy_target,
        key=key,
    )


@struct.dataclass
class _Micro:
    """Micro-batches: U mini-batches of S * C pieces, each one step of g whole groups."""

    x_t: Array  # [U, S, C, g * K, h, w, C']
    x_next: Array  # likewise
    logp_rollout: Array  # [U, S, C, g * K]
    sigma: Array  # [U, S, C]
    sigma_next: Array  # [U, S, C]
    rewards: Array  # [U, S, C, g, K]
    surprisal: Array  # [U, S, C, g, K]
    selected: Array  # [U, S, C, g, K] bool
    global_std: Array  # [U, S, C] of the whole batch's shaped rewards
    conditioning: Conditioning  # [U, S, C, g, ...]


def _micro_batches(
    program: Program, batch: Batch, experience: Rollout, selected: Array, global_std: Array
) -> _Micro:
    config, steps = program.config, program.trained_steps
    num_groups, size = experience.rewards.shape
    num_parts = config.grpo.minibatches
    micro = config.batch.micro_groups or num_groups // num_parts
    chunks = num_groups // num_parts // micro

    def split(a, axis=0):  # [..., P, ...] -> [U, C, ..., g, ...]
        # The groups of a micro-batch lie num_parts * chunks apart, so that each device, which
        # holds a run of neighbouring groups, takes part in every one of them.
        a = a.reshape(*a.shape[:axis], micro, num_parts, chunks, *a.shape[axis + 1 :])
        return jnp.moveaxis(a, (axis + 1, axis + 2), (0, 1))

    def grouped(a):  # [S, P, ...] -> [U, S, C, g, ...]
        return split(a, axis=1).swapaxes(1, 2)

    def per_step(a):  # [T, P * K, ...] -> [U, S, C, g * K, ...]
        a = grouped(a[steps].reshape(len(steps), num_groups, size, *a.shape[2:]))
        return a.reshape(*a.shape[:3], micro * size, *a.shape[5:])

    def shared(a):  # [P, ...] -> [U, S, C, g, ...], the same at every step
        return grouped(jnp.broadcast_to(a, (len(steps), *a.shape)))

    def scalar(a):  # [S] or [] -> [U, S, C]
        a = jnp.broadcast_to(a, len(steps))
        return jnp.broadcast_to(a[None, :, None], (num_parts, len(steps), chunks))

    trajectory = experience.trajectory
    return _Micro(
        x_t=per_step(trajectory.x_t),
        x_next=per_step(trajectory.x_next),
        logp_rollout=per_step(trajectory.logp),
        sigma=scalar(program.sigmas[steps]),
        sigma_next=scalar(program.sigmas[steps + 1]),
        rewards=shared(experience.rewards),
        surprisal=grouped(jnp.broadcast_to(experience.surprisal, (len(steps), num_groups, size))),
        selected=grouped(selected),
        global_std=scalar(global_std),
        conditioning=jax.tree.map(shared, batch.conditioning),
    )


def _step_log_prob(program: Program, variables: PyTree, frozen: Frozen, micro: _Micro):
    """(logp [n], mean, std) of one micro-batch under `variables`."""
    sampler, size = program.config.sampler, program.config.batch.group_size
    return step_log_prob(
        program.guide(sampler.guidance, frozen.negative),
        variables,
        micro.x_t,
        micro.x_next,
        micro.sigma,
        micro.sigma_next,
        repeat_groups(micro.conditioning, size),
        kernel=sampler.kernel,
        noise_level=sampler.noise_level,
        sigma_max=program.sigmas[1],
    )


def _old_log_probs(program: Program, params: PyTree, frozen: Frozen, parts: _Micro) -> Array:
    """logp [U, S, C, n] of the taken steps under the policy before the first update.

    The first update takes its own; only a further epoch reads mini-batch 0's from here. In a single
    epoch it is left at 0, which saves 1 / U of these forward passes.
    """
    first = 0 if program.config.grpo.epochs > 1 else 1
    logp = jnp.zeros((*parts.sigma.shape, parts.x_t.shape[3]))
    later = jax.tree.map(lambda a: a[first:], parts)
    if not later.sigma.shape[0]:
        return logp
    variables = bind(program.config.trainable, params, frozen.transformer)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), later)
    fresh = jax.lax.map(lambda micro: _step_log_prob(program, variables, frozen, micro)[0], flat)
    return logp.at[first:].set(fresh.reshape(*later.sigma.shape, -1))


def _loss(
    params: PyTree,
    program: Program,
    frozen: Frozen,
    micro: _Micro,
    logp_old: Array,
    first: Array,
    weight: Array,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one micro-batch, and what to log of it."""
    config, constraint = program.config, program.constraint
    options, shape = constraint_options(config), micro.rewards.shape  # [g, K]
    logp, mean, std = _step_log_prob(
        program, bind(program.config.trainable, params, frozen.transformer), frozen, micro
    )
    fresh = jax.lax.stop_gradient(logp)
    logp_old = jnp.where(first, fresh, logp_old)
    kl = None
    if constraint.needs_reference:
        reference = jax.lax.stop_gradient(
            _step_log_prob(program, frozen.transformer, frozen, micro)[1]
        )
        dt = micro.sigma_next - micro.sigma if config.grpo.kl_form == "flow_grpo" else None
        kl = gaussian_kl(mean, reference, std, dt).reshape(shape)
    signals = Signals(
        weight=weight,
        rewards=micro.rewards,
        surprisal=micro.surprisal,
        logp=logp.reshape(shape),
        logp_old=logp_old.reshape(shape),
        ratio=jnp.exp(fresh - logp_old).reshape(shape),
        kl=kl,
        entropy=jnp.mean(policy_entropy(std)),
        selected=micro.selected,
    )
    shaped = constraint.shape_reward(signals, options)
    signals = signals._replace(advantages=_advantages(program, shaped, micro.global_std))
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
    parts: _Micro,
    logp_old: Array,
    first: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """Gradients summed over the micro-batches [S, C] of one mini-batch, and one optimizer step."""
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (parts, logp_old))
    count = flat[1].shape[0]
    grad_fn = jax.grad(_loss, has_aux=True)

    def accumulate(total, piece):
        micro, logp_old = piece
        grads, aux = grad_fn(
            state.params,
            program,
            frozen,
            micro,
            logp_old,
            first,
            state.constraint_weight,
        )
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype) / count, total, grads), aux

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, aux = jax.lax.scan(accumulate, zeros, flat)
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


def _advantages(program: Program, rewards: Array, global_std: Array | None) -> Array:
    config = program.config.grpo
    return group_advantages(
        rewards,
        std=config.advantage_std,
        global_std=global_std if config.advantage_std == "global" else None,
        clip=config.advantage_clip,
    )
