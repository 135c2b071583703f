"""The recipes whose time to quality is compared, and what an iteration of each costs.

All of them are of the embedded model, with the same images an iteration, learning rate and LoRA:
what differs is which steps of a path are noisy and trained, the objective, the number of updates,
and how the images are divided into groups.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax

from benchmarks import setups
from pec_jax.config import Config, from_config_dict
from pec_jax.configs import shapes_study
from pec_jax.profiling import aot as ahead
from pec_jax.profiling import flops
from pec_jax.rl.train_step import train_step


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A name, and what it sets in the config of the study."""

    name: str
    fields: Mapping[str, object]

    @property
    def label(self) -> str:
        """The name as a directory has it."""
        return "".join(c if c.isalnum() or c in ".+-" else "-" for c in self.name)


def _window(*window: int, **more: object) -> dict[str, object]:
    return {"sampler.window": window} | {f"sampler.{name}": value for name, value in more.items()}


# Plain Flow-GRPO: all steps but the last.
REFERENCE = Recipe("all steps", _window())

KINDS: dict[str, tuple[Recipe, ...]] = {
    "window from the start": (
        REFERENCE,
        Recipe("window of 1, from step 0", _window(0, 1)),
        Recipe("window of 2, from step 0", _window(0, 2)),
        Recipe("window of 3, from step 0", _window(0, 3)),
    ),
    "later window": (
        Recipe("window of 1, from step 2", _window(2, 3)),
        Recipe("window of 1, from step 4", _window(4, 5)),
        Recipe("window of 2, from step 2", _window(2, 4)),
        Recipe("window of 3, from step 2", _window(2, 5)),
    ),
    "window that moves": (
        # MixGRPO stays 25 of 300 iterations at a place.
        Recipe("window of 2, moving", _window(0, 2, window_moves="forward", window_iterations=4)),
        Recipe("window of 2, at random", _window(0, 2, window_moves="at_random")),
    ),
    "CPS": (
        Recipe("CPS, all steps", _window(kernel="cps")),
        Recipe("CPS, all steps, squared error", _window(kernel="cps", log_density="squared_error")),
        Recipe("CPS, window of 2", _window(0, 2, kernel="cps")),
    ),
    "objective": (
        # The published clip range times 8: a log-ratio grows as 1 / sqrt(D), see shapes_grpo.
        Recipe(
            "GRPO-Guard, all steps",
            _window()
            | {
                "objective.name": "grpo_guard",
                "objective.grpo_guard.clip_low": 3.2e-5,
                "objective.grpo_guard.clip_high": 3.2e-5,
            },
        ),
        Recipe("DiffusionNFT", {"objective.name": "nft", "sampler.kernel": "ode"}),
        Recipe(
            "DiffusionNFT, 2 levels",
            {"objective.name": "nft", "sampler.kernel": "ode", "objective.nft.levels": 2},
        ),
    ),
    "updates and groups": (
        Recipe("all steps, one update", _window() | {"updates.minibatches": 1}),
        Recipe("window of 2, one update", _window(0, 2) | {"updates.minibatches": 1}),
        Recipe(
            "all steps, 12 groups of 8", _window() | {"batch.groups": 12, "batch.group_size": 8}
        ),
        Recipe(
            "all steps, 3 groups of 32", _window() | {"batch.groups": 3, "batch.group_size": 32}
        ),
    ),
}
RECIPES = tuple(recipe for kind in KINDS.values() for recipe in kind)
PEC = {"constraints.pec.weight": 6.0}  # of configs/shapes_pec
WITH_PEC = " + PEC"


def with_pec(recipe: Recipe) -> Recipe:
    """The recipe with PEC at the weight of the embedded default."""
    return Recipe(recipe.name + WITH_PEC, {**recipe.fields, **PEC})


def all_recipes() -> list[Recipe]:
    """Each without PEC and with it."""
    return [r for plain in RECIPES for r in (plain, with_pec(plain))]


def config_of(recipe: Recipe) -> Config:
    """The config of its runs, of plain length.

    Raises:
      ConfigError: fields that do not go together.
    """
    config = shapes_study.get_config()
    config.update_from_flattened_dict(dict(recipe.fields))
    return from_config_dict(config)


@functools.cache
def flops_per_iteration(recipe_fields: tuple[tuple[str, object], ...]) -> int:
    """Of the train step; an encoder that is there to be logged alone does not count."""
    config = config_of(Recipe("", dict(recipe_fields)))
    mesh, program, arguments, shardings = ahead.abstract_step(config, jax.devices()[:1])
    state, frozen, batch, key = (getattr(arguments, n) for n in ("state", "frozen", "batch", "key"))
    setup = setups.Setup(config, program, mesh, shardings, state.params, frozen, batch, key)
    if not setups.reading_perception(setup):
        setup = setups.without_perception(setup)
    step = functools.partial(train_step, setups.as_compiled(setup.program))
    return flops.count(step, state, frozen, batch, key)


def cost(recipe: Recipe) -> int:
    """FLOPs of one iteration."""
    return flops_per_iteration(tuple(recipe.fields.items()))
