"""GRPO-Guard: ratios that are centred at 1, and steps that weigh alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.config.fields import field
from pec_jax.rl.guard import guarded_surrogate, normalised_log_ratio, step_weight
from pec_jax.rl.losses import ratio_metrics
from pec_jax.rl.objective import Micro, ObjectiveDefinition, register
from pec_jax.rl.objectives.grpo import Grpo, transition
from pec_jax.rl.policy import Actor
from pec_jax.rl.signals import PerSample, Signals
from pec_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class GrpoGuardOptions:
    """The authors' clip range on SD3 is 2e-6 (OCR, GenEval) or 4e-6 (PickScore)."""

    clip_low: float = field("e_low: the ratio is clipped below 1 - e_low.", 4e-6, low=0.0, high=1.0)
    clip_high: float = field("e_high: and above 1 + e_high.", 4e-6, low=0.0)


class GrpoGuard(Grpo):
    """The clipped surrogate of the normalised ratio, each step divided by its dt.

    log r = mean (x_next - mu_old) (mu - mu_old) / std. Constraints that read the importance ratio
    see the plain one.

    Source: GRPO-Guard (arXiv 2510.22319); see docs/objectives.md.
    """

    name = "grpo_guard"
    evens_steps = True

    def prepare(self, actor: Actor, params: PyTree, micro: Micro) -> PyTree:
        """logp_old [P, k] and mu_old [P, k, ...]."""
        said, shape = actor.log_prob(params, transition(micro)), micro.rewards.shape
        return {
            "logp": said.logp.reshape(shape),
            "mean": said.mean.reshape(*shape, *said.mean.shape[1:]),
        }

    def evaluate(
        self, actor: Actor, params: PyTree, micro: Micro, state: dict[str, PyTree], needs: set[str]
    ) -> tuple[dict[str, Any], PyTree, dict[str, Array]]:
        """As GRPO's, and the normalised log-ratio with the step's weight."""
        plain = dataclasses.replace(micro, old=micro.old["logp"])
        signals, view, metrics = super().evaluate(actor, params, plain, state, needs)
        mean, taken = view.mean, transition(micro)
        mean_old = micro.old["mean"].reshape(mean.shape)
        mean_old = jnp.where(micro.first, jax.lax.stop_gradient(mean), mean_old)
        log_ratio = normalised_log_ratio(taken.x_next, mean, mean_old, view.std)
        weight = step_weight(taken.sigma, taken.sigma_next)
        return signals, (log_ratio.reshape(micro.rewards.shape), weight), metrics

    def losses(
        self,
        view: tuple[PerSample, Array],
        signals: Signals,
        bounds: Callable[[float, float], tuple[float, float]],
    ) -> tuple[PerSample, dict[str, Float[Array, ""]]]:
        """The guarded surrogate of each sample."""
        log_ratio, weight = view
        low, high = bounds(self.options.clip_low, self.options.clip_high)
        losses = guarded_surrogate(log_ratio, signals.advantages, weight, low, high)
        return losses, ratio_metrics(log_ratio, jnp.zeros_like(log_ratio), low, high)


register(ObjectiveDefinition("grpo_guard", "GRPO-Guard", GrpoGuardOptions, GrpoGuard))
