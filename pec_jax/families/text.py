"""The text encoders of a pipeline directory: what a family says of each, and loading one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.families.tokenizers import load_tokenizer, stored_length
from pec_jax.io import read_json
from pec_jax.models import clip, t5
from pec_jax.models.text import TextTower
from pec_jax.weights.convert import boxed_variables, check_tensors, from_torch
from pec_jax.weights.parts import open_part
from pec_jax.weights.tensors import Tensors, WeightsError

CLIP_LENGTH = 77  # tokens, of all published models


class Built(NamedTuple):
    """The network of a text encoder."""

    module: Any  # token ids [N, L] (and their mask, where it is masked) -> what the family combines
    ignored: Sequence[str]  # regular expressions of stored tensors that the module lacks
    length: int | None = None  # tokens that its table of positions holds; None: any number


Build = Callable[[Mapping[str, Any], Any], Built]  # (config.json, dtype) -> network


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family.

    Attributes:
        part: its component, such as "text_encoder_2"; "tokenizer_2" is its tokenizer's.
        class_name: its class, which model_index.json names.
        tower: its name in the `TextStack`.
        build: its network.
        length: tokens that published encoders take; 0 where the family's `text_length` decides.
        optional: whether a pipeline may lack it.
        masked: whether it is called with a mask of the tokens that are not padding.
    """

    part: str
    class_name: str
    tower: str
    build: Build
    length: int = 0
    optional: bool = False
    masked: bool = False

    @property
    def tokenizer(self) -> str:
        """The component of its tokenizer."""
        return self.part.replace("text_encoder", "tokenizer")


def clip_encoder(part: str, tower: str, *, projected: bool) -> TextEncoder:
    """A CLIP text encoder, with the projection into the space it shares with images or without."""

    def build(values: Mapping[str, Any], dtype: Any) -> Built:
        config = clip.CLIPTextConfig.from_dict(values)
        module = clip.CLIPTextModel(config, dtype=dtype, with_projection=projected)
        return Built(module, clip.IGNORED_TENSORS, config.max_position_embeddings)

    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return TextEncoder(part, name, tower, build, CLIP_LENGTH)


def t5_encoder(part: str, tower: str, *, optional: bool = False) -> TextEncoder:
    """A T5 encoder, which takes texts of any length."""

    def build(values: Mapping[str, Any], dtype: Any) -> Built:
        return Built(t5.T5Encoder(t5.T5Config.from_dict(values), dtype=dtype), t5.IGNORED_TENSORS)

    return TextEncoder(part, "T5EncoderModel", tower, build, optional=optional)


@dataclasses.dataclass(frozen=True)
class OpenedTower:
    """A text encoder whose files have been found to fit each other, before its weights are read.

    Attributes:
        length: tokens that it takes.
        load: reads its weights, and gives it with prompts of a length in tokens.
    """

    length: int
    load: Callable[[int], TextTower]


def open_tower(
    root: Path, encoder: TextEncoder, text_length: int, dtype: Any, variant: str = ""
) -> OpenedTower:
    """Opens one text encoder, and loads its tokenizer.

    Args:
        root: the pipeline's directory.
        encoder: which.
        text_length: tokens, for an encoder without a length of its own.
        dtype: in which it is kept and computes.
        variant: such as "fp16", where there are several files of weights.

    Raises:
        WeightsError: a file or tensor is missing, left over or misshapen; an unsupported config.
    """
    directory = root / encoder.part
    tensors = open_part(directory, "model", variant)
    values = read_json(directory / "config.json")
    try:
        module, ignore, own_length = encoder.build(values, dtype)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{directory / 'config.json'}: {error}") from error
    tokenizer = load_tokenizer(root / encoder.tokenizer)
    ids = np.zeros((1, 2), np.int32)
    inputs = (ids, ids > 0) if encoder.masked else (ids,)
    load = _checked(tensors, module, inputs, ignore=ignore, dtype=dtype)
    length = int(min(own_length or text_length, tokenizer.model_max_length))

    def load_tower(length: int) -> TextTower:
        return TextTower(module, load(), tokenizer, length, masked=encoder.masked)

    return OpenedTower(length, load_tower)


def tower_length(root: Path, encoder: TextEncoder, text_length: int) -> int:
    """The tokens of an encoder, from its tokenizer's config alone, which may be absent."""
    return int(min(encoder.length or text_length, stored_length(root / encoder.tokenizer)))


def load_variables(
    directory: str | Path,
    module: nn.Module,
    *example: Any,
    ignore: Sequence[str] = (),
    dtype: jnp.dtype = jnp.float32,
    variant: str = "",
    sharding: Any = None,
) -> Any:
    """Loads the variables of one transformers model.

    Args:
        directory: holds `model.safetensors`, whole or in shards.
        module: whose variables to load.
        *example: arguments of a call, which fix the parameters' shapes.
        ignore: regular expressions of stored tensors that the module does not have.
        dtype: what the parameters are kept in.
        variant: such as "fp16", where there are several files of weights.
        sharding: where they go, a sharding for all or a `Placement`; None is the default device.

    Returns:
        The module's variables, on their devices.

    Raises:
        WeightsError: a tensor or file is missing, left over or misshapen; the message names it.
    """
    tensors = open_part(Path(directory), "model", variant)
    return _checked(tensors, module, example, ignore=ignore, dtype=dtype, sharding=sharding)()


def _checked(
    tensors: Tensors,
    module: nn.Module,
    example: Sequence[Any],
    *,
    ignore: Sequence[str],
    dtype: Any,
    sharding: Any = None,
) -> Callable[[], Any]:
    """What reads a module's variables from tensors that have been found to fit it."""
    expected = boxed_variables(module, *example)
    check_tensors(tensors, expected, ignore)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return lambda: from_torch(tensors, expected, ignore=ignore, dtype=dtype, sharding=sharding)
