"""The score: from latents to rewards and surprisals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pec_jax.distributed.mesh import over_batch
from pec_jax.perception.entropy import perceptual_variance, scale_features
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.combined import CombinedReward
from pec_jax.rl.advantages import known_mean
from pec_jax.rl.rollout import map_images
from pec_jax.types import Batch, Frozen, PyTree, Rollout, Trajectory


@dataclasses.dataclass(frozen=True)
class Space:
    """A perceptual space: images to features.

    Attributes:
        network: key of its variables in `Frozen.networks`; '' for none ({}).
        features: (variables, images [N, H, W, 3] in [0, 1]) -> [N, d] raw features.
        share: of the perceptual entropy; 0 where it is only evaluated.
    """

    network: str
    features: Callable[[PyTree, Array], Array]
    share: float

    def of_images(self, frozen: Frozen, images: Array) -> Float[Array, "p k d"]:
        """Raw features of images [P, K, H, W, 3] in [0, 1]."""
        # Written as the rewards write it, so that an encoder that is also a reward runs once.
        flat = to_uint8_levels(images).reshape(-1, *images.shape[2:])
        variables = frozen.networks[self.network] if self.network else {}
        found = self.features(variables, flat)
        return found.reshape(*images.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The static half of a score.

    Attributes:
        decode: (VAE's variables, latents [N, *latent]) -> images [N, H, W, 3] in [0, 1].
        reward: those of weight other than 0, summed.
        spaces: name -> those that the perceptual entropy is measured in; their shares sum to 1.
        surprisal: raw features {space: [..., K, d]} -> surprisals [..., K], nats per dimension.
        images: of every group, decoded and scored at once; 0 is all.
        at_steps: indices of the sampler steps whose predictions are perceived, or None for the
            final image.
    """

    decode: Callable[[PyTree, Array], Array]
    reward: CombinedReward
    spaces: Mapping[str, Space]
    surprisal: Callable[[Mapping[str, Array]], Array]
    images: int
    at_steps: tuple[int, ...] | None = None


def score(
    scorer: Scorer, inputs: tuple[Frozen, Batch], trajectory: Trajectory, group_size: int
) -> tuple[Rollout, dict[str, Array]]:
    """Decodes the images, some of every group at a time, and measures what they are worth.

    Returns:
        As `conclude`.
    """
    latents = trajectory.x_0
    seen = look(scorer, inputs, latents.reshape(-1, group_size, *latents.shape[1:]))
    return conclude(scorer, inputs, trajectory, seen)


def look(
    scorer: Scorer, inputs: tuple[Frozen, Batch], x_0: Float[Array, "p k ..."]
) -> dict[str, PyTree]:
    """What is measured of single images, and what host rewards have been asked about them.

    Args:
        scorer: static.
        inputs: all that does not learn, and the prompts.
        x_0: final latents, some or all of each group.

    Returns:
        Arrays [P, k, ...] for `conclude`.
    """
    frozen, batch = inputs

    def look_at(x_0):  # [P, k, *latent]
        images = decode(scorer, frozen, x_0)
        return {
            "rewards": scorer.reward.start(frozen.networks, images, batch.reward_inputs),
            "features": _features(scorer, frozen, images),
            "levels": jnp.round(images * 255).astype(jnp.uint8),
        }

    return map_images(look_at, x_0, math.gcd(scorer.images, x_0.shape[1]))


def conclude(
    scorer: Scorer,
    inputs: tuple[Frozen, Batch],
    trajectory: Trajectory,
    seen: Mapping[str, PyTree],
) -> tuple[Rollout, dict[str, Array]]:
    """The rollout of whole groups, from what `look` has seen of all their images.

    Returns:
        The rollout with rewards [P, K] and surprisals [P, K] ([S, P, K] where perception looks at
        the steps), and the metrics of both.
    """
    frozen, _ = inputs
    rewards, parts = scorer.reward.finish(seen["rewards"])
    x_0 = trajectory.x_0.reshape(*rewards.shape, *trajectory.x_0.shape[1:])
    surprisal = scorer.surprisal(seen["features"])
    within = known_mean(jnp.square(rewards - known_mean(rewards, 1)), 1)  # variance [P, 1]
    metrics = {
        "reward/mean": known_mean(rewards),
        "reward/std": jnp.mean(jnp.sqrt(within)),
        **{f"reward/{name}": known_mean(part) for name, part in parts.items()},
        **{f"failures/{name}": failures(part) for name, part in parts.items()},
        "entropy/perceptual": known_mean(surprisal),
        "diversity/variance_reward": jnp.mean(within),
        "diversity/variance_perceptual": _unit_variance(scorer, seen["features"]),
        "diversity/variance_latent": jnp.mean(perceptual_variance(x_0.reshape(*x_0.shape[:2], -1))),
        "diversity/variance_pixel": _pixel_variance(seen["levels"]),
    }
    if scorer.at_steps is not None:
        surprisal = step_surprisal(scorer, frozen, trajectory, rewards.shape[1])
        metrics["entropy/perceptual_steps"] = known_mean(surprisal)
    return Rollout(trajectory=trajectory, rewards=rewards, surprisal=surprisal), metrics


def failures(scores: Float[Array, "p k"]) -> Float[Array, ""]:
    """The share of the images that a reward could not judge."""
    return jnp.mean(~jnp.isfinite(scores), dtype=jnp.float32)


def decode(
    scorer: Scorer, frozen: Frozen, latents: Float[Array, "p k ..."]
) -> Float[Array, "p k h w 3"]:
    """Latents to images in [0, 1]."""
    flat = over_batch(latents.reshape(-1, *latents.shape[2:]))
    images = scorer.decode(frozen.vae, flat)
    return images.reshape(*latents.shape[:2], *images.shape[1:])


def _features(scorer: Scorer, frozen: Frozen, images: Array) -> dict[str, Array]:
    return {name: space.of_images(frozen, images) for name, space in scorer.spaces.items()}


def step_surprisal(
    scorer: Scorer, frozen: Frozen, trajectory: Trajectory, group_size: int
) -> Float[Array, "s p k"]:
    """Surprisals of what each trained step predicts the image to be."""
    assert trajectory.x_0_hat is not None  # a rollout keeps them where perception is at the steps
    predictions = trajectory.x_0_hat[jnp.asarray(scorer.at_steps)]  # [S, P * K, *latent]

    def one_step(x_0_hat):
        features = map_images(
            lambda part: _features(scorer, frozen, decode(scorer, frozen, part)),
            x_0_hat.reshape(-1, group_size, *x_0_hat.shape[1:]),
            scorer.images,
        )
        return scorer.surprisal(features)

    return jax.lax.map(one_step, predictions)


def _unit_variance(scorer: Scorer, features: Mapping[str, Array]) -> Float[Array, ""]:
    """Variance of the unit features within a prompt, the encoders' mean by their shares."""
    parts = [
        space.share * jnp.mean(perceptual_variance(scale_features(features[name], "unit")))
        for name, space in scorer.spaces.items()
    ]
    return jnp.sum(jnp.stack(parts))


def _pixel_variance(levels: UInt8[Array, "p k h w 3"]) -> Float[Array, ""]:
    """Mean over prompts of the images' variance, summed over pixels.

    E x^2 - (E x)^2 and not the squared distances: in this form nothing of the images' size in
    float32 is kept, and levels are whole numbers, whose sums over a group are exact.
    """
    x = levels.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x), axis=1) - jnp.square(jnp.mean(x, axis=1))
    return jnp.mean(jnp.sum(variance, axis=(1, 2, 3))) / 255**2
