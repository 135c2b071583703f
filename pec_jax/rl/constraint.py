"""What a constraint is: a name, a section of options, what it needs, and a few pure hooks.

Adding one is one file in `rl/constraints/` (or a user's own, given by --plugin): a dataclass of
options, the functions, and `register(Constraint(...))`. Nothing else has to know of it. In the
order in which a training step calls them, the hooks are

    bonus         (options, state, signals) -> [..., P, K]   added to the rewards
    clip_bounds   (options, low, high) -> (low, high)        of the policy loss
    select        (options, signals, key) -> [..., P, K]     marks samples of the whole batch
    sample_loss   (options, state, signals, losses, selected) -> [P, k]   of each sample
    extra_loss    (options, state, signals) -> []            added to the mean of those
    update_state  (options, state, mean_surprisal) -> state  for the next iteration

`state` is a dict of scalars that the run remembers, at least {"weight": lambda}.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pec_jax.config.fields import field
from pec_jax.config.registry import CONSTRAINTS
from pec_jax.rl.signals import LATENT, PERCEPTUAL, RAW, REWARD_STD

State = dict[str, Array]


def weight_field(help: str = "lambda; 0 is off.") -> Any:
    """The field `weight`, off by default."""
    return field(help, 0.0, low=0.0)


def space_field() -> Any:
    """The field `space`."""
    return field("Where surprise is measured.", PERCEPTUAL, choices=(PERCEPTUAL, LATENT))


def unit_field() -> Any:
    """The field `unit`."""
    return field("What the weight is counted in.", RAW, choices=(RAW, REWARD_STD))


def space_needs(options: Any) -> set[str]:
    """Signals that measuring surprise in the options' space takes."""
    return {"logp"} if options.space == LATENT else set()


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A method.

    Attributes:
        name: as in a config, `constraints.NAME`.
        label: as in tables.
        label_alone: as in tables where no other constraint is on, "{objective}" standing for the
            label of the objective; "" is `label`.
        options: the dataclass of its section.
        is_on: whether its options let it do anything; one that is off leaves no trace.
        needs: the signals marked * that its hooks read, given its options.
        excludes: constraints that it makes no sense beside.
        parameter: the option that tables show.
        uses_space: whether tables show a space.
        target: of the options, exp(H*) as a share of the base model's exp(H_perc) that the run
            measures beforehand into state["target"]; None where there is no such thing.
    """

    name: str
    label: str
    options: type
    is_on: Callable[[Any], bool] = lambda options: options.weight != 0
    needs: Callable[[Any], set[str]] = lambda options: set()
    excludes: tuple[str, ...] = ()
    label_alone: str = ""
    parameter: str = "weight"
    uses_space: bool = True
    target: Callable[[Any], float] | None = None
    bonus: Callable | None = None
    clip_bounds: Callable | None = None
    select: Callable | None = None
    sample_loss: Callable | None = None
    extra_loss: Callable | None = None
    update_state: Callable | None = None

    @property
    def origin(self) -> str:
        """The module that defines it."""
        return self.options.__module__

    def initial_state(self, options: Any) -> State:
        """What the run remembers of it before the first iteration."""
        state = {"weight": jnp.asarray(getattr(options, "weight", 0.0), jnp.float32)}
        if self.target is not None:
            state["target"] = jnp.zeros((), jnp.float32)
        return state

    def target_entropy(self, options: Any, base_entropy: float) -> float:
        """H* = the base model's H_perc + log of the share to be kept, nats per dimension."""
        assert self.target is not None
        return base_entropy + math.log(self.target(options))


def register(constraint: Constraint) -> Constraint:
    """Makes a constraint known to configs; see `config.registry`."""
    return CONSTRAINTS.register(constraint)
