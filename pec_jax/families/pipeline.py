"""Loading a pipeline from a directory in diffusers' layout, whatever its family."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pec_jax.families.base import Pipeline
from pec_jax.families.networks import load_network, read_config
from pec_jax.families.registry import (
    Family,
    present_text_encoders,
    read_family,
    transformer_network,
)
from pec_jax.families.text import load_tower, stored_length
from pec_jax.models.text import TextStack
from pec_jax.types import PyTree
from pec_jax.weights.tensors import WeightsError


def load_pipeline(
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    text: bool = True,
    t5_length: int = 0,
    param_dtype: Any = jnp.float32,
    vae_dtype: Any = jnp.float32,
    remat: str = "none",
    variant: str = "",
    sharding: Any = None,
    weights: bool = True,
) -> Pipeline:
    """Loads a pipeline of a known family.

    Args:
        directory: holds model_index.json and a directory for each part it names.
        dtype: in which the transformer and the text encoders compute.
        text: load the text encoders too; False where prompts are embedded already.
        t5_length: tokens of the text encoders without a length of their own; 0 is diffusers'
            choice for the family.
        param_dtype: in which the transformer's parameters are kept.
        vae_dtype: in which the autoencoder computes.
        remat: what of the transformer the backward pass computes again, of `layers.REMAT`.
        variant: such as "fp16", where there are several files of weights.
        sharding: where the variables of transformer and autoencoder go, tensor by tensor; None
            keeps them in host memory, as numpy arrays.
        weights: False reads config files alone and returns the variables' shapes.

    Returns:
        The pipeline, an instance of its family.

    Raises:
        WeightsError: a part is missing, of an unsupported class, or its weights do not fit; the
            message names file and tensor.
    """
    root = Path(directory)
    family = read_family(root)
    scheduler = read_config(root / "scheduler", family.scheduler_class, "scheduler_config.json")
    transformer, transformer_variables = load_network(
        family.transformer_network,
        root / "transformer",
        dtype,
        param_dtype=param_dtype,
        remat=remat,
        variant=variant,
        sharding=sharding,
        weights=weights,
    )
    vae, vae_variables = load_network(
        family.vae_network,
        root / "vae",
        vae_dtype,
        variant=variant,
        sharding=sharding,
        weights=weights,
    )
    pipeline = family(
        transformer=transformer,
        transformer_variables=transformer_variables,
        vae=vae,
        vae_variables=vae_variables,
        text=load_text_stack(root, dtype, t5_length=t5_length, variant=variant) if text else None,
        text_lengths=text_lengths(root, family, t5_length),
        scheduler=scheduler,
    )
    _check_channels(root, pipeline)
    return pipeline


def _check_channels(root: Path, pipeline: Pipeline) -> None:
    taken, returned = pipeline.transformer_channels
    if not taken == returned == pipeline.latent_channels:
        raise WeightsError(
            f"{root}: the transformer takes {taken} and gives {returned} channels, the "
            f"autoencoder has {pipeline.latent_channels}; they belong to different models"
        )


def load_transformer(
    directory: str | os.PathLike[str], dtype: Any = jnp.float32, **options: Any
) -> tuple[Any, PyTree]:
    """Loads a transformer's directory that stands alone; its config.json names its class.

    Args:
        directory: such as PIPELINE/transformer.
        dtype: in which the network computes.
        **options: as `load_network` takes them, such as `param_dtype`, `remat` or `sharding`.

    Returns:
        (network, variables).

    Raises:
        WeightsError: anything missing, left over, misshapen or unsupported, by name.
    """
    directory = Path(directory)
    return load_network(transformer_network(directory), directory, dtype, **options)


def load_text_stack(
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    t5_length: int = 0,
    variant: str = "",
) -> TextStack:
    """Loads tokenizers and text encoders of a pipeline directory.

    Args:
        directory: holds model_index.json, which says which encoders there are, and their
            directories.
        dtype: in which the encoders are kept and compute.
        t5_length: as in `load_pipeline`.
        variant: such as "fp16", where there are several files of weights.

    Returns:
        The text stack, ready to encode prompts.

    Raises:
        WeightsError: a file or tensor is missing, left over or misshapen; an unsupported config.
    """
    root = Path(directory)
    family = read_family(root)
    text_length = t5_length or family.text_length
    towers = {
        encoder.tower: load_tower(root, encoder, text_length, dtype, variant)
        for encoder in present_text_encoders(root, family)
    }
    lengths = family.shared_lengths({name: tower.length for name, tower in towers.items()})
    towers = {name: tower.cut_to(lengths[name]) for name, tower in towers.items()}
    return TextStack(towers, family.combiner(root, text_length))


def text_lengths(root: Path, family: Family, t5_length: int = 0) -> dict[str, int]:
    """Tokens of each text encoder, by tower, from the directory's small files alone.

    Args:
        root: the pipeline's directory; tokenizers and encoders may be absent.
        family: whose text encoders.
        t5_length: as in `load_pipeline`.
    """
    text_length = t5_length or family.text_length
    return family.shared_lengths(
        {e.tower: stored_length(root, e, text_length) for e in family.text_encoders}
    )
