"""What a reward is, and how one becomes known to configs.

A reward is a definition (a name, a section of options, a factory) and, made by the factory, a
`Reward`: `prepare` runs once on the host over the whole prompt set and returns arrays with one row
per prompt; `score` is pure, runs inside the train step and sees the rows of the prompts at hand.
To add one, write one file:

```python
# warmth.py
import dataclasses

import jax.numpy as jnp
from pec_jax.rewards import Reward, RewardOptions, field, register


@dataclasses.dataclass(frozen=True)
class WarmthOptions(RewardOptions):
    gain: float = field("Factor of the score.", 1.0, low=0.0)


@register("warmth", WarmthOptions)
def warmth(options, networks):
    '''Red minus blue, averaged over the image; the prompt does not matter.'''

    def score(variables, images, inputs):  # [P, K, H, W, 3] in [0, 1]
        return options.gain * jnp.mean(images[..., 0] - images[..., 2], axis=(-2, -1))  # [P, K]

    return Reward("warmth", score)
```

and train with `--plugin=warmth.py --config.rewards.warmth.weight=0.5`. One with weights of its own
loads them with `networks.load` (or `networks.encoder`) and names the key in `Reward.network`; a
function that cannot be traced (OCR, a remote judge) goes through `pec_jax.rewards.host`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from flax import struct
from jaxtyping import Array

from pec_jax.config.fields import field
from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.perception.networks import Networks
from pec_jax.types import PyTree


def nothing_per_prompt(variables: PyTree, prompts: Sequence[Prompt]) -> PyTree:
    """A pytree without arrays."""
    return {}


@struct.dataclass
class Measures:
    """What an evaluation publishes of N images of P prompts."""

    scores: dict[str, Array]  # `quality/<name>` [P, N] fp32
    diversities: dict[str, Array]  # `diversity/<name>` [P] fp32; nan where nothing can be said


@dataclasses.dataclass(frozen=True)
class Job:
    """A reward that works on the host while the device goes on.

    Attributes:
        start: (images [P, K, H, W, 3] in [0, 1], inputs [P, ...]) -> tickets [P, K] int32.
        finish: tickets [P, K], each of them once, -> scores [P, K] fp32; waits for them.
    """

    start: Callable[[Array, PyTree], Array]
    finish: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Reward:
    """One way to judge images. Static; weights are arguments.

    Attributes:
        name: under which it is logged, `reward/<name>`.
        score: (variables, images [P, K, H, W, 3] in [0, 1], inputs [P, ...]) -> [P, K] fp32; pure.
        prepare: (variables, N prompts) -> pytree of NumPy arrays [N, ...]; on the host, once per
            prompt set.
        network: key of the variables that both get, see `Networks`; '' for none ({}). Several
            keys give a tuple of variables.
        input_shapes: N -> what `prepare` returns, as shapes; None where it can run without
            weights.
        measure: called as `score`, what the evaluation publishes in its place -> Measures; pure.
            For a judge that sees more in an image than its score. None publishes the score.
        job: the same as `score` in two parts, which a train step calls apart; None where nothing
            is gained by it.
    """

    name: str
    score: Callable[[PyTree, Array, PyTree], Array]
    prepare: Callable[[PyTree, Sequence[Prompt]], PyTree] = nothing_per_prompt
    network: str | tuple[str, ...] = ""
    input_shapes: Callable[[int], PyTree] | None = None
    measure: Callable[[PyTree, Array, PyTree], Measures] | None = None
    job: Job | None = None


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """What every reward has; a definition may add its own."""

    weight: float = field("Its factor in the sum that is trained on; 0 is off.", 0.0)
    evaluate: bool = field("Measure it in the evaluation although its weight is 0.", False)
    max_failures: float = field(
        "Share of an iteration's images that may go unjudged before a run stops.",
        0.25,
        low=0.0,
        high=1.0,
    )


@dataclasses.dataclass(frozen=True)
class ModelRewardOptions(RewardOptions):
    """Of a reward with a network."""

    model: str = field("Directory, file or hub id@revision; '' is the pipeline's own.", "")
    tokenizer: str = field(
        "Directory or hub id@revision of a tokenizer, where the model has none; '' is the "
        "pipeline's first.",
        "",
    )


@dataclasses.dataclass(frozen=True)
class RewardDefinition:
    """A reward as a config knows it.

    Attributes:
        name: as in a config, `rewards.NAME`.
        options: the dataclass of its section, `RewardOptions` or a subclass.
        make: (options, networks) -> Reward.
    """

    name: str
    options: type
    make: Callable[[Any, Networks], Reward]

    @property
    def origin(self) -> str:
        """The module that defines it."""
        return self.make.__module__


def register(name: str, options: type = RewardOptions) -> Callable[[Callable], Callable]:
    """Decorator that makes a factory (options, networks) -> Reward known to configs.

    Raises:
        ValueError: the name is taken by another module's reward.
    """

    def add(make: Callable) -> Callable:
        REWARDS.register(RewardDefinition(name, options, make))
        return make

    return add
