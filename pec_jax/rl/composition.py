"""All constraints of a run together: rewards, losses and states are sums over those that are on.

Nothing here knows a constraint by name. A constraint that is off is not in the set, so that a run
without it and a run with it off are one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pec_jax.config import ConfigError
from pec_jax.config.registry import CONSTRAINTS
from pec_jax.rl.advantages import known_mean
from pec_jax.rl.constraint import Constraint, State
from pec_jax.rl.signals import PerSample, Signals

States = dict[str, State]  # constraint -> what the run remembers of it
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Constraints:
    """Those that are on, with their options.

    Attributes:
        active: (definition, options) of each, in the order of their names.
    """

    active: tuple[tuple[Constraint, Any], ...]

    @classmethod
    def from_config(cls, sections: Mapping[str, Any], provides: set[str]) -> Constraints:
        """The constraints that a config turns on.

        Args:
            sections: name -> options of all of them.
            provides: the signals that the objective can fill.

        Raises:
            ConfigError: two that exclude each other, or one that needs what the objective lacks.
        """
        active = tuple(
            (CONSTRAINTS[name], options)
            for name, options in sections.items()
            if CONSTRAINTS[name].is_on(options)
        )
        on = {constraint.name for constraint, _ in active}
        for constraint, options in active:
            if others := sorted(on.intersection(constraint.excludes)):
                raise ConfigError(
                    f"config.constraints.{constraint.name} and .{others[0]} exclude each other: "
                    "turn one of them off."
                )
            if missing := sorted(constraint.needs(options) - provides):
                raise ConfigError(
                    f"config.constraints.{constraint.name} needs {', '.join(missing)} of the "
                    "policy's steps, which the chosen config.objective does not have: turn it off, "
                    "or take another objective."
                )
        return cls(active)

    def __iter__(self) -> Iterator[tuple[Constraint, Any]]:
        return iter(self.active)

    @property
    def needs(self) -> set[str]:
        """Signals marked * that any of them reads."""
        return set().union(*(c.needs(options) for c, options in self))

    @property
    def pays_surprisal(self) -> bool:
        """Whether any adds to the rewards."""
        return any(c.bonus for c, _ in self)

    def initial_states(self) -> States:
        """What the run remembers of each before the first iteration."""
        return {c.name: c.initial_state(options) for c, options in self}

    def shaped_rewards(self, states: States, signals: Signals) -> PerSample:
        """R~ = R + the sum of all bonuses."""
        shaped = signals.rewards
        for bonus in self._bonuses(states, signals).values():
            shaped = shaped + bonus
        return shaped

    def clip_bounds(self, low: float, high: float) -> tuple[float, float]:
        """(e_low, e_high) after all of them."""
        for constraint, options in self:
            if constraint.clip_bounds:
                low, high = constraint.clip_bounds(options, low, high)
        return low, high

    def select(self, signals: Signals, key: Array) -> dict[str, Bool[Array, "s p k"]]:
        """What each marks of the whole batch, by name; only those that mark anything."""
        return {
            c.name: c.select(options, signals, key) for c, options in self if c.select is not None
        }

    def sample_losses(
        self, states: States, signals: Signals, losses: PerSample, selected: Mapping[str, Array]
    ) -> PerSample:
        """The loss of each sample, as they leave it."""
        for c, options in self:
            if c.sample_loss:
                losses = c.sample_loss(
                    options, states[c.name], signals, losses, selected.get(c.name)
                )
        return losses

    def extra_losses(self, states: States, signals: Signals) -> dict[str, Float[Array, ""]]:
        """What each adds to the mean of the samples' losses, by name."""
        return {
            c.name: c.extra_loss(options, states[c.name], signals)
            for c, options in self
            if c.extra_loss
        }

    def next_states(self, states: States, surprisal: PerSample) -> States:
        """What the run remembers after a rollout of these surprisals."""
        known = jnp.isfinite(surprisal)
        mean = jnp.where(jnp.any(known), known_mean(surprisal), jnp.nan)
        return {
            c.name: c.update_state(options, states[c.name], mean)
            if c.update_state
            else states[c.name]
            for c, options in self
        }

    def metrics(self, states: States, signals: Signals, selected: Mapping[str, Array]) -> Metrics:
        """Scalars to log of the whole batch, `constraint/NAME/...`; see `docs/method.md`."""
        found = {
            f"constraint/{name}/{field}": value
            for name, state in states.items()
            for field, value in state.items()
        }
        shaped_std = _group_std(self.shaped_rewards(states, signals))
        for name, bonus in self._bonuses(states, signals).items():
            found[f"constraint/{name}/bonus_mean"] = known_mean(bonus)
            found[f"constraint/{name}/share"] = _group_std(bonus) / jnp.maximum(shaped_std, 1e-12)
        for name, marked in selected.items():
            found[f"constraint/{name}/selected"] = jnp.mean(marked.astype(jnp.float32))
        return found

    def _bonuses(self, states: States, signals: Signals) -> dict[str, PerSample]:
        return {c.name: c.bonus(options, states[c.name], signals) for c, options in self if c.bonus}


def _group_std(x: Array) -> Array:
    """Population std within a group of what is finite, mean over groups."""
    x = jax.lax.stop_gradient(x)
    return jnp.mean(jnp.sqrt(known_mean(jnp.square(x - known_mean(x, -1)), -1)))
