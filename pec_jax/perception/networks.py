"""The networks of rewards and encoders: each loaded once, onto the mesh, under a key.

A reward and an encoder that name the same model share its weights, and, since they then are the
same arrays in the step, its computation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pec_jax.distributed.mesh import put_array
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.preprocessing import PIL
from pec_jax.types import PyTree
from pec_jax.weights.published import Files
from pec_jax.weights.tensors import WeightsError

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
        rounding: how images are resized, see `preprocessing`.
        variables: key -> variables of what was loaded so far.
    """

    own: Path
    locate: Callable[[str], Path]
    dtype: Any = np.float32
    place: Placement | None = None
    weights: bool = True
    rounding: str = PIL
    variables: dict[str, PyTree] = dataclasses.field(default_factory=dict, repr=False)
    _encoders: dict[str, Encoder] = dataclasses.field(default_factory=dict, repr=False)

    def directory(self, name: str, model: str) -> Path:
        """Of a model as a config names it; '' is the pipeline's own of that name."""
        return self.locate(model) if model else self.own / name

    def encoder(
        self, name: str, model: str, architecture: Files | None = None, tokenizer: str = ""
    ) -> Encoder:
        """The encoder of a directory or file; the second call for one of them loads nothing.

        Args:
            name: of the pipeline's own, where `model` is ''.
            model: as in a config.
            architecture: config files of a model whose path lacks them; its preprocessing is the
                one that counts.
            tokenizer: directory or hub id of one, for a model that brings none; '' is the
                pipeline's first.

        Raises:
            WeightsError, ValueError: as `loading.load_encoder`.
        """
        from pec_jax.perception.loading import Source, load_encoder

        path = self.directory(name, model)
        key = str(path)
        source = Source(
            path,
            key,
            self.dtype,
            self.place,
            self.weights,
            architecture=architecture,
            tokenizers=self._tokenizers(tokenizer),
            rounding=self.rounding,
        )
        # One model's weights serve several encoders, which may differ in how they see an image.
        encoder_key = f"{key}#{architecture['preprocessor_config.json']}" if architecture else key
        if encoder_key not in self._encoders:
            encoder, variables = load_encoder(source)
            self.variables.setdefault(key, variables)
            self._encoders[encoder_key] = encoder
        return self._encoders[encoder_key]

    def _tokenizers(self, name: str) -> tuple[Path, ...]:
        if not self.weights:
            return ()  # shapes encode no text, and what they lie in has no tokenizer
        return (self.locate(name) if name else self.own.parent / "tokenizer",)

    def head(self, path: Path, dim: int) -> str:
        """The affine head in a file or directory, see `heads`.

        Args:
            path: of its weights.
            dim: number of features that it takes.

        Returns:
            The key of its variables, {"kernel": [dim], "bias": []} in fp32.

        Raises:
            WeightsError: no such head, or one of other features.
        """
        key = f"{path}#head"
        if key not in self.variables:
            self.variables[key] = self._head(path, dim)
        (size,) = self.variables[key]["kernel"].shape
        if size != dim:
            raise WeightsError(
                f"{path}: a head of {size} features, but the encoder gives {dim}; they belong to "
                "different models"
            )
        return key

    def _head(self, path: Path, dim: int) -> dict[str, Any]:
        from pec_jax.perception.heads import affine_head
        from pec_jax.weights.model_files import open_model

        if not self.weights:
            shapes = {"kernel": (dim,), "bias": ()}
            return {
                name: jax.ShapeDtypeStruct(shape, np.float32, sharding=self._whole(shape))
                for name, shape in shapes.items()
            }
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {
            name: put_array(value, self._whole(value.shape) or default)
            for name, value in affine_head(open_model(path)).items()
        }

    def _whole(self, shape: Sequence[int]) -> Any:
        """Where an array goes that is not split."""
        if self.place is None:
            return None
        return self.place((None,) * len(shape), shape)

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
        for encoder in self._encoders.values():
            variables = kept[encoder.network]
            params = {
                name: value
                for name, value in variables["params"].items()
                if name not in encoder.text_modules
            }
            kept[encoder.network] = {**variables, "params": params}
        return kept
