"""Loading the text encoders of a pipeline directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.families.registry import present_text_encoders, read_family
from pec_jax.io import read_json
from pec_jax.models import clip, t5
from pec_jax.models.text import TextStack, TextTower, flux_conditioning, sd3_conditioning
from pec_jax.weights.convert import boxed_variables, from_torch
from pec_jax.weights.tensors import WeightsError, read_tensors


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


def _load_tower(
    root: Path, part: str, class_name: str, t5_length: int, dtype: jnp.dtype, variant: str
) -> TextTower:
    """One encoder and its tokenizer; T5 has no length of its own."""
    tokenizer = load_tokenizer(root / part.replace("text_encoder", "tokenizer"))
    directory = root / part
    values = read_json(directory / "config.json")
    try:
        if class_name == "T5EncoderModel":
            module: Any = t5.T5Encoder(t5.T5Config.from_dict(values), dtype=dtype)
            ignore, length = t5.IGNORED_TENSORS, t5_length
        else:
            config = clip.CLIPTextConfig.from_dict(values)
            projected = class_name == "CLIPTextModelWithProjection"
            module = clip.CLIPTextModel(config, dtype=dtype, with_projection=projected)
            ignore, length = clip.IGNORED_TENSORS, config.max_position_embeddings
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{directory / 'config.json'}: {error}") from error
    ids = np.zeros((1, 2), np.int32)
    variables = load_variables(directory, module, ids, ignore=ignore, dtype=dtype, variant=variant)
    return TextTower(module, variables, tokenizer, min(length, tokenizer.model_max_length))


def load_text_stack(
    directory: str | Path,
    dtype: jnp.dtype = jnp.float32,
    *,
    t5_length: int = 0,
    variant: str = "",
) -> TextStack:
    """Loads tokenizers and text encoders of a pipeline in diffusers' directory layout.

    Args:
        directory: holds model_index.json, which says which encoders there are, and their
            directories.
        dtype: in which the encoders are kept and compute.
        t5_length: tokens that T5 sees; 0 is diffusers' own choice, 256 for Stable Diffusion 3
            and 512 for FLUX.1.
        variant: such as "fp16", where there are several files of weights.

    Returns:
        The text stack, ready to encode prompts.

    Raises:
        WeightsError: a file or tensor is missing, left over or misshapen; a config that we cannot
            compute.
    """
    root = Path(directory)
    family = read_family(root)
    t5_length = t5_length or family.t5_length
    classes = present_text_encoders(root, family)
    towers = {
        family.towers[part]: _load_tower(root, part, name, t5_length, dtype, variant)
        for part, name in classes.items()
    }
    if family.name == "flux":
        return TextStack(towers, flux_conditioning)
    # As in diffusers, the first tokenizer's length holds for both CLIP towers.
    shortest = min(towers[name].length for name in ("clip", "clip_2"))
    for name in ("clip", "clip_2"):
        towers[name] = dataclasses.replace(towers[name], length=shortest)
    width = read_json(root / "transformer" / "config.json").get("joint_attention_dim", 4096)
    return TextStack(towers, sd3_conditioning(t5_length, width))
