"""DiffusionNFT: good and bad images contrasted in the forward process, without log-probs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.config import ConfigError
from pec_jax.config.fields import field
from pec_jax.flow.sampler import FlowSampler, image_keys
from pec_jax.rl import nft
from pec_jax.rl.objective import Micro, Objective, ObjectiveDefinition, Samples, register
from pec_jax.rl.policy import Actor, Policy
from pec_jax.rl.signals import PerSample, Signals
from pec_jax.types import PyTree, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class NftOptions:
    """The authors' beta is 1, or .1 for OCR and several rewards; their decay ramps."""

    beta: float = field("How far the positive policy lies from the old one.", 1.0, low=1e-3)
    clip: float = field("c: advantages beyond it count as certainly good or bad.", 5.0, low=1e-3)
    levels: int = field("Noise levels per image; 0 is all of the sampler's but one.", 0, low=0)
    decay: str = field("Schedule of the old policy's decay.", "ramp", choices=tuple(nft.DECAYS))


class Nft(Objective):
    """(c / beta) [r L(v+) + (1 - r) L(v-)], r = 1/2 + A / (2 c), v+- = v_old +- beta (v - v_old).

    The old policy draws the images, and follows the trained one after each iteration.

    Source: DiffusionNFT (arXiv 2509.16117); see docs/objectives.md.
    """

    provides = frozenset({"kl"})
    needs_paths = False

    def check(self, sampler: FlowSampler) -> None:
        """Refuses more noise levels than the sampler has."""
        if self.options.levels > sampler.num_steps:
            raise ConfigError(
                f"config.objective.nft.levels is {self.options.levels}, more than the "
                f"{sampler.num_steps} of config.sampler.num_steps."
            )

    def initial_state(self, params: PyTree) -> dict[str, PyTree]:
        """The old policy, at first the policy itself."""
        return {"old": params}

    def rollout_params(self, state: TrainState) -> PyTree:
        """The old policy's."""
        return state.objective["old"]

    def samples(self, policy: Policy, rollout: Rollout, key: Array) -> Samples:
        """The final latents, and for each of them the noise levels it is trained at."""
        x_0 = rollout.trajectory.x_0
        levels = self.options.levels or policy.sampler.num_steps - 1
        order, noise = jax.random.split(key)
        sigma = nft.draw_sigmas(image_keys(order, len(x_0)), policy.sampler.sigmas, levels)
        return Samples(
            steps={"index": jnp.arange(levels)},
            taken={"sigma": sigma},
            images={"x_0": x_0, "key": image_keys(noise, len(x_0))},
        )

    def evaluate(
        self, actor: Actor, params: PyTree, micro: Micro, state: dict[str, PyTree], needs: set[str]
    ) -> tuple[dict[str, Any], PyTree, dict[str, Array]]:
        """Velocities of the policy and of the old one at the images, noised."""
        x_0, sigma, shape = micro.images["x_0"], micro.taken["sigma"], micro.rewards.shape

        def draw(key):
            return jax.random.normal(jax.random.fold_in(key, micro.step["index"]), x_0.shape[1:])

        noised = nft.forward_process(x_0, jax.vmap(draw)(micro.images["key"]), sigma)
        velocity = actor.velocity(params)(noised.x_t, sigma)
        old = jax.lax.stop_gradient(actor.velocity(state["old"])(noised.x_t, sigma))
        moved = jax.lax.stop_gradient(nft.velocity_kl(velocity, old))
        signals, metrics = {}, {"distance_to_old": jnp.mean(moved)}
        if "kl" in needs:
            base = actor.velocity(None)(noised.x_t, sigma)
            signals["kl"] = nft.velocity_kl(velocity, base).reshape(shape)
            metrics["kl"] = jax.lax.stop_gradient(jnp.mean(signals["kl"]))
        return signals, (velocity, old, noised.target, sigma), metrics

    def losses(
        self,
        view: tuple[Array, Array, Array, Array],
        signals: Signals,
        bounds: Callable[[float, float], tuple[float, float]],
    ) -> tuple[PerSample, dict[str, Float[Array, ""]]]:
        """The contrastive loss of each sample."""
        options, shape = self.options, signals.advantages.shape
        r = nft.optimality(signals.advantages, options.clip).reshape(-1)
        losses = nft.losses(*view, r, beta=options.beta, clip=options.clip)
        return losses.reshape(shape), {"optimality": jnp.mean(r)}

    def next_state(
        self, state: dict[str, PyTree], params: PyTree, updates: Array
    ) -> dict[str, PyTree]:
        """The old policy follows."""
        decay = nft.old_policy_decay(self.options.decay, updates)
        return {"old": nft.follow(state["old"], params, decay)}


register(ObjectiveDefinition("nft", "DiffusionNFT", NftOptions, Nft))
