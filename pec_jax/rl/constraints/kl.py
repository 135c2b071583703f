"""A KL loss to the base model."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pec_jax.config.fields import field
from pec_jax.rl.constraint import Constraint, State, register, weight_field
from pec_jax.rl.signals import Signals, sample_mean


@dataclasses.dataclass(frozen=True)
class KlOptions:
    """Flow-GRPO has .01 for PickScore and .04 for OCR and GenEval, with form flow_grpo."""

    weight: float = weight_field("beta; 0 is off.")
    form: str = field(
        "exact, or as Flow-GRPO's code, which leaves dt out of the variance.",
        "exact",
        choices=("exact", "flow_grpo"),
    )


def reference_kl(options: KlOptions, state: State, signals: Signals) -> Float[Array, ""]:
    """beta mean KL(policy || reference).

    Source: Flow-GRPO (arXiv 2505.05470), eq. 5. Its code divides by 2 s^2 where the transition's
    variance is s^2 |dt|: the form `flow_grpo` is the exact one times |dt|. Of `cps`, whose variance
    has no such factor, both forms are the same.
    """
    kl = signals.kl if options.form == "exact" else signals.kl * jnp.abs(signals.dt)
    return state["weight"] * sample_mean(signals, kl)


register(
    Constraint(
        name="kl",
        label="KL",
        label_alone="{objective} w/ KL",
        options=KlOptions,
        needs=lambda options: {"kl", "dt"} if options.form == "flow_grpo" else {"kl"},
        uses_space=False,
        extra_loss=reference_kl,
    )
)
