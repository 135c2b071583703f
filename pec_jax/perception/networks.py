"""The networks of rewards and encoders: each loaded once, onto the mesh, under a key.

A reward and an encoder that name the same model share its weights, and, since they then are the
same arrays in the step, its computation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pec_jax.perception.encoder import Encoder
from pec_jax.types import PyTree

# (logical axes, shape) -> where an array lies; `distributed.mesh.Placement`, which imports flax
Placement = Callable[[Sequence[str | None], Sequence[int]], Any]


@dataclasses.dataclass(frozen=True)
class Networks:
    """Loads networks, and keeps their variables until the step takes them.

    Attributes:
        own: directory of the pipeline's own encoders, where a model of '' is looked for by name.
        locate: from a config's model to its directory.
        dtype: in which networks are kept and compute.
        place: where variables go, by their logical axes; None is the default device.
        weights: False makes shapes of variables, for ahead-of-time compilation.
        variables: key -> variables of what was loaded so far.
    """

    own: Path
    locate: Callable[[str], Path]
    dtype: Any = np.float32
    place: Placement | None = None
    weights: bool = True
    variables: dict[str, PyTree] = dataclasses.field(default_factory=dict, repr=False)
    _encoders: dict[str, Encoder] = dataclasses.field(default_factory=dict, repr=False)

    def directory(self, name: str, model: str) -> Path:
        """Of a model as a config names it; '' is the pipeline's own of that name."""
        return self.locate(model) if model else self.own / name

    def encoder(self, name: str, model: str) -> Encoder:
        """The encoder in a Hugging Face directory; the second call for one directory loads nothing.

        Raises:
            WeightsError, ValueError: as `hugging_face.load_encoder`.
        """
        from pec_jax.perception.hugging_face import load_encoder

        directory = self.directory(name, model)
        key = str(directory)
        if key not in self._encoders:
            encoder, self.variables[key] = load_encoder(
                directory, self.dtype, key=key, sharding=self.place, weights=self.weights
            )
            self._encoders[key] = encoder
        return self._encoders[key]

    def load(self, directory: Path, module: Any, *example: Any, ignore: Sequence[str] = ()) -> str:
        """Loads `model.safetensors` into a linen module of one's own.

        Args:
            directory: holds the file.
            module: whose parameters carry logical axis names and are named as the file's tensors.
            *example: arguments of a call, which fix the parameters' shapes.
            ignore: regular expressions of stored tensors that the module does not have.

        Returns:
            The key of its variables.
        """
        from pec_jax.families.text import load_variables
        from pec_jax.weights.convert import boxed_variables, placed_shapes

        # Not the directory alone: an encoder of it may be loaded as well, and is another network.
        key = f"{directory}#{type(module).__name__}"
        if key in self.variables:
            return key
        if self.weights:
            self.variables[key] = load_variables(
                directory, module, *example, ignore=ignore, dtype=self.dtype, sharding=self.place
            )
        else:
            boxes = boxed_variables(module, *example)
            self.variables[key] = placed_shapes(boxes, dtype=self.dtype, sharding=self.place)
        return key

    def without_text(self) -> dict[str, PyTree]:
        """All variables but those of text towers, for when all texts are encoded."""
        kept = dict(self.variables)
        for key, encoder in self._encoders.items():
            params = {k: v for k, v in kept[key]["params"].items() if k not in encoder.text_modules}
            kept[key] = {**kept[key], "params": params}
        return kept
