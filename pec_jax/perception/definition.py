"""How a perceptual encoder becomes known to configs.

Adding one is one file in `perception/encoders/` (or a user's own, given by --plugin) that calls
`register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pec_jax.config.fields import field
from pec_jax.config.registry import ENCODERS
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.networks import Networks


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """What every encoder has; a definition may add its own."""

    model: str = field("Directory or hub id@revision; '' is the pipeline's own.", "")
    evaluate: bool = field("Measure diversity in its space in the evaluation.", False)


@dataclasses.dataclass(frozen=True)
class EncoderDefinition:
    """An encoder as a config knows it.

    Attributes:
        name: as in a config, `encoders.NAME`.
        options: the dataclass of its section, `EncoderOptions` or a subclass.
        make: (options, networks) -> Encoder.
    """

    name: str
    options: type
    make: Callable[[Any, Networks], Encoder]

    @property
    def origin(self) -> str:
        """The module that defines it."""
        return self.make.__module__


def register(name: str, options: type = EncoderOptions) -> Callable[[Callable], Callable]:
    """Decorator that makes a factory (options, networks) -> Encoder known to configs."""

    def add(make: Callable) -> Callable:
        ENCODERS.register(EncoderDefinition(name, options, make))
        return make

    return add
