"""Which sampler steps are stochastic, and hence trained, and how they move as a run goes on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

FORWARD, AT_RANDOM = "forward", "at_random"


def stochastic_steps(
    num_steps: int, window: tuple[int, int] | None = None, train_fraction: float = 0.99
) -> tuple[bool, ...]:
    """Which steps add noise, and are therefore trained; the others follow the ODE.

    Args:
        num_steps: T.
        window: the half-open range [start, stop) of stochastic steps, or None for the first
            int(train_fraction * T). Flow-GRPO leaves out the last, nearly noiseless step;
            Flow-GRPO-Fast and MixGRPO train a short window.
        train_fraction: in (0, 1], used without a window.

    Returns:
        T booleans, static: a part of the program and not of its data.

    Raises:
        ValueError: where no step would be stochastic, or the window leaves [0, T].
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: a sampler takes at least one step.")
    if window is None:
        if not 0 < train_fraction <= 1:
            raise ValueError(f"train_fraction is {train_fraction}: it must lie in (0, 1].")
        window = (0, int(train_fraction * num_steps))
        if window[1] == 0:
            raise ValueError(
                f"No step of {num_steps} would be trained at train_fraction={train_fraction}: "
                "take more steps, or name a window."
            )
    start, stop = window
    if not 0 <= start < stop <= num_steps:
        raise ValueError(
            f"window ({start}, {stop}) must satisfy 0 <= start < stop <= num_steps={num_steps}."
        )
    return tuple(start <= step < stop for step in range(num_steps))


@dataclasses.dataclass(frozen=True)
class Motion:
    """How far the window has moved from where it began.

    Attributes:
        places: how many there are: the window starts 0 .. places - 1 steps later than at first.
        order: "forward", from each place to the next and after the last to the first again, or
            "at_random", to any of them alike.
        iterations: that it stays at a place.

    Source: MixGRPO (arXiv 2507.21802), section 3.2, for "forward": its progressive sliding window,
    with a stride of 1; Flow-GRPO-Fast of Flow-GRPO's code for "at_random".
    """

    places: int
    order: str
    iterations: int = 1

    def offset(self, iteration: Int[Array, ""], key: Key[Array, ""]) -> Int[Array, ""]:
        """Steps that the window has moved by in an iteration.

        Args:
            iteration: counted from 0.
            key: of the run, the same in each iteration; "forward" does not read it.
        """
        stays = iteration // self.iterations
        if self.order == FORWARD:
            return stays % self.places
        return jax.random.randint(jax.random.fold_in(key, stays), (), 0, self.places, jnp.int32)
