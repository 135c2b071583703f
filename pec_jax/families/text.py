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

from pec_jax.io import read_json
from pec_jax.models import clip, t5
from pec_jax.models.text import TextTower
from pec_jax.weights.convert import boxed_variables, from_torch
from pec_jax.weights.tensors import WeightsError, read_tensors

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


def load_tower(
    root: Path, encoder: TextEncoder, text_length: int, dtype: Any, variant: str = ""
) -> TextTower:
    """Loads one text encoder and its tokenizer.

    Args:
        root: the pipeline's directory.
        encoder: which.
        text_length: tokens, for an encoder without a length of its own.
        dtype: in which it is kept and computes.
        variant: such as "fp16", where there are several files of weights.

    Raises:
        WeightsError: a file or tensor is missing, left over or misshapen; an unsupported config.
    """
    tokenizer = load_tokenizer(root / encoder.tokenizer)
    directory = root / encoder.part
    values = read_json(directory / "config.json")
    try:
        module, ignore, length = encoder.build(values, dtype)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{directory / 'config.json'}: {error}") from error
    ids = np.zeros((1, 2), np.int32)
    inputs = (ids, ids > 0) if encoder.masked else (ids,)
    variables = load_variables(
        directory, module, *inputs, ignore=ignore, dtype=dtype, variant=variant
    )
    length = min(length or text_length, tokenizer.model_max_length)
    return TextTower(module, variables, tokenizer, length, masked=encoder.masked)


def stored_length(root: Path, encoder: TextEncoder, text_length: int) -> int:
    """The tokens of an encoder, from its tokenizer's config alone, which may be absent."""
    length = encoder.length or text_length
    path = root / encoder.tokenizer / "tokenizer_config.json"
    if not path.is_file():
        return length
    return min(length, int(read_json(path).get("model_max_length", length)))


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
    tensors = read_tensors(directory, "model", variant)
    expected = boxed_variables(module, *example)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return from_torch(tensors, expected, ignore=ignore, dtype=dtype, sharding=sharding)


def load_tokenizer(directory: str | Path) -> Any:
    """Loads a Hugging Face tokenizer from local files, without running code found among them.

    Args:
        directory: holds the tokenizer's files.

    Returns:
        The tokenizer.

    Raises:
        WeightsError: there is none; the message names the directory.
    """
    # Slow to import, and of no use to those who read embeddings from a file.
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise WeightsError(f"{directory}: no such directory; a tokenizer is expected there")
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise WeightsError(f"{directory}: no usable tokenizer: {error}") from error
