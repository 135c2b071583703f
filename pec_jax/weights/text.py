"""Loading the text encoders of a Stable Diffusion 3 pipeline directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models import clip, t5
from pec_jax.models.text import MAX_T5_LENGTH, TextStack
from pec_jax.weights.convert import abstract_variables, from_torch
from pec_jax.weights.tensors import WeightsError, read_json, read_tensors


def load_variables(
    directory: str | Path,
    module: nn.Module,
    *example: Any,
    ignore: Sequence[str] = (),
    dtype: jnp.dtype = jnp.float32,
) -> Any:
    """Loads the variables of one transformers model.

    Args:
        directory: holds `model.safetensors`, whole or in shards.
        module: whose variables to load.
        *example: arguments of a call, which fix the parameters' shapes.
        ignore: regular expressions of stored tensors that the module does not have.
        dtype: what the parameters are kept in.

    Returns:
        The module's variables, on the default device.

    Raises:
        WeightsError: a tensor or file is missing, left over or misshapen; the message names it.
    """
    tensors = read_tensors(directory, "model")
    expected = abstract_variables(module, *example)
    return jax.device_put(from_torch(tensors, expected, ignore=ignore, dtype=dtype))


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


def _load_clip(directory: Path, dtype: jnp.dtype) -> tuple[clip.CLIPTextModel, Any]:
    config = clip.CLIPTextConfig.from_dict(read_json(directory / "config.json"))
    module = clip.CLIPTextModel(config, dtype=dtype)
    ids = np.zeros((1, 2), np.int32)
    return module, load_variables(directory, module, ids, ignore=clip.IGNORED_TENSORS, dtype=dtype)


def _load_t5(directory: Path, dtype: jnp.dtype) -> tuple[t5.T5Encoder, Any]:
    config = t5.T5Config.from_dict(read_json(directory / "config.json"))
    module = t5.T5Encoder(config, dtype=dtype)
    ids = np.zeros((1, 2), np.int32)
    return module, load_variables(directory, module, ids, ignore=t5.IGNORED_TENSORS, dtype=dtype)


def load_text_stack(directory: str | Path, dtype: jnp.dtype = jnp.float32) -> TextStack:
    """Loads tokenizers and text encoders of a pipeline in diffusers' directory layout.

    Args:
        directory: holds `tokenizer`, `text_encoder` (CLIP), `tokenizer_2`, `text_encoder_2` (CLIP),
            `tokenizer_3` and `text_encoder_3` (T5).
        dtype: in which the encoders are kept and compute.

    Returns:
        The text stack, ready to encode prompts.

    Raises:
        WeightsError: a file or tensor is missing, left over or misshapen.
        ValueError: a config that we cannot compute.
    """
    root = Path(directory)
    first, second, third = (
        load_tokenizer(root / name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
    )
    tower, tower_variables = _load_clip(root / "text_encoder", dtype)
    tower_2, tower_2_variables = _load_clip(root / "text_encoder_2", dtype)
    encoder, encoder_variables = _load_t5(root / "text_encoder_3", dtype)
    positions = min(m.config.max_position_embeddings for m in (tower, tower_2))
    return TextStack(
        clip=tower,
        clip_2=tower_2,
        t5=encoder,
        variables={
            "clip": tower_variables,
            "clip_2": tower_2_variables,
            "t5": encoder_variables,
        },
        tokenizers=(first, second, third),
        # As in diffusers, the first tokenizer's length holds for both CLIP towers.
        clip_length=min(first.model_max_length, positions),
        t5_length=min(third.model_max_length, MAX_T5_LENGTH),
    )
