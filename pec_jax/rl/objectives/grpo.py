"""GRPO on the steps of a stochastic sampler, as Flow-GRPO has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from pec_jax.config import ConfigError
from pec_jax.config.fields import field
from pec_jax.flow.sampler import FlowSampler, StepLogProb
from pec_jax.flow.transition import gaussian_kl, policy_entropy
from pec_jax.rl.losses import clipped_surrogate, ratio_metrics
from pec_jax.rl.objective import Micro, Objective, ObjectiveDefinition, Samples, register
from pec_jax.rl.policy import Actor, Policy
from pec_jax.rl.signals import PerSample, Signals
from pec_jax.types import PyTree, Rollout, Transition

# Of the largest to the median gain of the trained steps. It is 12 at most for flow_sde and
# dance_sde on the schedules of 6 to 40 steps. At 147 (cps, 6 steps of Stable Diffusion 3's
# schedule) nothing was learned, see docs/results/time_to_quality.
MAX_UNEVEN_GAIN = 30.0


@dataclasses.dataclass(frozen=True)
class GrpoOptions:
    """Flow-GRPO's clip range on SD3 is 1e-4, since logp is a mean over dimensions."""

    clip_low: float = field("e_low: the ratio is clipped below 1 - e_low.", 1e-4, low=0.0, high=1.0)
    clip_high: float = field("e_high: and above 1 + e_high.", 1e-4, low=0.0)


class Grpo(Objective):
    """mean max(-A r, -A clip(r, 1 - e_low, 1 + e_high)), r = p_theta(x_next) / p_old(x_next).

    The ratio at the first update is exactly 1: logp_old is that update's own logp, its gradient
    stopped. Later updates compare with logp_old recomputed by the update's own graph, before the
    first of them.

    Source: Flow-GRPO (arXiv 2505.05470), eq. 5.
    """

    provides = frozenset({"logp", "logp_old", "ratio", "kl", "dt", "entropy"})
    metrics_of_first = ("ratio_max_deviation", "logp_drift")

    name = "grpo"
    evens_steps = False  # whether the loss makes all steps weigh alike

    def check(self, sampler: FlowSampler) -> None:
        """Refuses a sampler without noise: there would be nothing to learn from.

        And warns where one of its trained steps has most of the gradient.
        """
        reached = sampler.reached_steps
        if not len(reached) or not bool(jnp.all(sampler.step_std(reached) > 0)):
            raise ConfigError(
                f"config.sampler (kernel {sampler.kernel}, noise_level {sampler.noise_level}) has "
                f"a trained step without noise, or none at all, and the objective {self.name!r} "
                "learns from noise: take another kernel, a noise_level above 0, or a window that "
                "leaves out the last step."
            )
        if not self.evens_steps and (factor := sampler.uneven_gain()) > MAX_UNEVEN_GAIN:
            logging.warning(
                "config.sampler (kernel %s) has a trained step of so little noise that its "
                "log-density answers %.0f times as much to the model as the median step's: its "
                "gradient drowns the others'. Take a window that leaves it out, or config.sampler."
                "log_density=squared_error.",
                sampler.kernel,
                factor,
            )

    def samples(self, policy: Policy, rollout: Rollout, key: Array) -> Samples:
        """The trained steps of every path."""
        steps, sigmas = policy.sampler.trained_steps, jnp.asarray(policy.sampler.sigmas)
        path = rollout.trajectory
        assert path.x_t is not None and path.x_next is not None and path.logp is not None
        return Samples(
            steps={
                "sigma": sigmas[steps],
                "sigma_next": sigmas[steps + 1],
            },
            taken={"x_t": path.x_t[steps], "x_next": path.x_next[steps], "logp": path.logp[steps]},
            images=(),
        )

    def prepare(self, actor: Actor, params: PyTree, micro: Micro) -> PyTree:
        """logp_old [P, k]."""
        return actor.log_prob(params, transition(micro)).logp.reshape(micro.rewards.shape)

    def evaluate(
        self, actor: Actor, params: PyTree, micro: Micro, state: dict[str, PyTree], needs: set[str]
    ) -> tuple[dict[str, Any], StepLogProb, dict[str, Array]]:
        """Log-probs of the taken steps, and the KL to the reference where a constraint needs it."""
        taken, shape = transition(micro), micro.rewards.shape
        said = actor.log_prob(params, taken)
        logp = said.logp.reshape(shape)
        fresh = jax.lax.stop_gradient(logp)
        logp_old = jnp.where(micro.first, fresh, micro.old)
        signals: dict[str, Any] = {
            "logp": logp,
            "logp_old": logp_old,
            "ratio": jnp.exp(fresh - logp_old),
            "entropy": jnp.mean(policy_entropy(said.std)),
            "dt": actor.policy.sampler.time_factor(taken),
        }
        metrics = {"kl": jnp.float32(0.0)}
        if "kl" in needs:
            mean = jax.lax.stop_gradient(actor.log_prob(None, taken).mean)
            signals["kl"] = gaussian_kl(said.mean, mean, said.std).reshape(shape)
            metrics["kl"] = jax.lax.stop_gradient(jnp.mean(signals["kl"]))
        drift = jnp.abs(fresh - micro.taken["logp"].reshape(shape))
        return signals, said, metrics | {"logp_drift": jnp.max(drift)}

    def losses(
        self, view: PyTree, signals: Signals, bounds: Callable[[float, float], tuple[float, float]]
    ) -> tuple[PerSample, dict[str, Float[Array, ""]]]:
        """The clipped surrogate of each sample."""
        low, high = bounds(self.options.clip_low, self.options.clip_high)
        losses = clipped_surrogate(signals.logp, signals.logp_old, signals.advantages, low, high)
        return losses, ratio_metrics(signals.logp, signals.logp_old, low, high)


def transition(micro: Micro) -> Transition:
    """The steps of a micro-batch."""
    return Transition(
        x_t=micro.taken["x_t"],
        x_next=micro.taken["x_next"],
        sigma=micro.step["sigma"],
        sigma_next=micro.step["sigma_next"],
    )


register(ObjectiveDefinition("grpo", "Flow-GRPO", GrpoOptions, Grpo))
