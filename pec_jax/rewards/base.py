"""What a reward is, the registry of rewards, and weighted sums of several.

A reward is a `Reward`: `prepare` runs once on the host over the whole prompt set and returns arrays
with one row a prompt; `score` is pure, runs inside the train step and sees the rows of the prompts
at hand. To add one, write one file and import it before the run starts:

```python
# warmth.py
import jax.numpy as jnp
from pec_jax.rewards.base import Reward, register


@register("warmth")
def warmth(options):
    '''Red minus blue, averaged over the image; the prompt does not matter.'''

    def prepare(prompts):
        return {}  # nothing per prompt: a pytree without arrays

    def score(params, images, inputs):  # [P, K, H, W, 3] in [0, 1]
        return jnp.mean(images[..., 0] - images[..., 2], axis=(-2, -1))  # [P, K]

    return Reward("warmth", prepare, score)
```

Then `combine({"warmth": 1.0, "attributes": 0.5})` and a config can name it. A function that cannot
be traced (OCR, a remote judge) goes through `pec_jax.rewards.host` instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pec_jax.data.prompts import Prompt
from pec_jax.perception.preprocessing import to_uint8_levels as as_8bit

__all__ = [
    "REGISTRY",
    "CombinedReward",
    "Reward",
    "as_8bit",
    "combine",
    "make",
    "register",
    "reject_unknown_options",
]

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Reward:
    """One way to judge images.

    Attributes:
      name: under which it is logged, `reward/<name>`.
      prepare: prompts (N) -> pytree of NumPy arrays [N, ...]; on the host, once per prompt set.
      score: (params, images [P, K, H, W, 3] in [0, 1], inputs [P, ...]) -> [P, K] fp32; pure.
      params: what `score` needs of weights; an argument of the step, never a constant in it.
    """

    name: str
    prepare: Callable[[Sequence[Prompt]], PyTree]
    score: Callable[[PyTree, Array, PyTree], Array]
    params: PyTree = dataclasses.field(default_factory=dict, repr=False)


Factory = Callable[[Mapping[str, Any]], Reward]
REGISTRY: dict[str, Factory] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator that puts a factory `options -> Reward` into `REGISTRY`.

    Raises:
      ValueError: the name is taken by another factory.
    """

    def add(factory: Factory) -> Factory:
        taken = REGISTRY.get(name)
        # Running a notebook cell again defines the same function anew: that replaces it.
        if taken is not None and _origin(taken) != _origin(factory):
            raise ValueError(f"The reward name {name!r} is already taken by {_origin(taken)}.")
        REGISTRY[name] = factory
        return factory

    return add


def _origin(factory: Factory) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


def make(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Builds a registered reward.

    Args:
      name: a key of `REGISTRY`.
      options: what its factory takes, e.g. {"encoder": Encoder} for `clip` and `pickscore`.

    Raises:
      ValueError: unknown name (the valid ones are listed), or options that the factory rejects.
    """
    if name not in REGISTRY:
        raise ValueError(f"Unknown reward {name!r}. Valid names: {', '.join(sorted(REGISTRY))}.")
    return REGISTRY[name](options or {})


@dataclasses.dataclass(frozen=True)
class CombinedReward:
    """A weighted sum of rewards: R = sum_i weight_i R_i.

    Attributes:
      rewards: name -> Reward.
      weights: name -> factor; a reward of weight 0 is only logged.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]

    @property
    def params(self) -> dict[str, PyTree]:
        """Name -> that reward's weights."""
        return {name: reward.params for name, reward in self.rewards.items()}

    def prepare(self, prompts: Sequence[Prompt]) -> dict[str, PyTree]:
        """Name -> arrays [N, ...] of that reward; on the host, once per prompt set."""
        return {name: reward.prepare(prompts) for name, reward in self.rewards.items()}

    def score(
        self, params: Mapping[str, PyTree], images: Array, inputs: Mapping[str, PyTree]
    ) -> tuple[Array, dict[str, Array]]:
        """Judges the images of P groups.

        Args:
          params: as `self.params`.
          images: [P, K, H, W, 3] in [0, 1].
          inputs: as `prepare` returns them, rows of the P prompts.

        Returns:
          The weighted sum [P, K] fp32, and each reward by itself, unweighted, {name: [P, K]}.

        Raises:
          ValueError: a reward returned something that is not [P, K].
        """
        parts = {}
        for name, reward in self.rewards.items():
            part = reward.score(params[name], images, inputs[name])
            if part.shape != images.shape[:2]:
                raise ValueError(
                    f"The reward {name!r} returned an array of shape {part.shape}; "
                    f"expected one number per image, {images.shape[:2]}."
                )
            parts[name] = part.astype(jnp.float32)
        # Weight 0 leaves a reward out altogether, for 0 * nan would spoil the sum.
        terms = [self.weights[name] * parts[name] for name in parts if self.weights[name]]
        return sum(terms, jnp.zeros(images.shape[:2], jnp.float32)), parts


def combine(
    weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]] | None = None
) -> CombinedReward:
    """Builds the weighted sum of registered rewards.

    Args:
      weights: name -> factor, e.g. {"pickscore": 1.0, "attributes": 0.5}.
      options: name -> options of that reward's factory.

    Raises:
      ValueError: no reward named, only zero weights, a weight that is not finite, an unknown name,
        or options for a reward that is not used.
    """
    options = options or {}
    if not weights:
        raise ValueError(f"Name at least one reward, of {', '.join(sorted(REGISTRY))}.")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"The weight of the reward {name!r} must be finite, not {weight}.")
    if not any(weights.values()):
        raise ValueError("All reward weights are 0: there would be nothing to learn from.")
    stray = sorted(set(options) - set(weights))
    if stray:
        raise ValueError(f"Options for rewards that are not used: {', '.join(stray)}.")
    rewards = {name: make(name, options.get(name)) for name in weights}
    return CombinedReward(rewards, {name: float(weight) for name, weight in weights.items()})


def reject_unknown_options(name: str, options: Mapping[str, Any], valid: Sequence[str]) -> None:
    """Raises a ValueError that lists the valid options if there are others."""
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ValueError(
            f"Unknown options of the reward {name!r}: {', '.join(unknown)}. "
            f"Valid options: {', '.join(valid) or 'none'}."
        )
