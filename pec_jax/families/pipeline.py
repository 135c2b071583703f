"""Loading a pipeline from a directory in diffusers' layout, whatever its family."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pec_jax.families.base import Pipeline
from pec_jax.families.networks import load_network, open_network, read_config
from pec_jax.families.registry import (
    FAMILIES,
    Family,
    check_parts,
    present_text_encoders,
    read_family,
    transformer_network,
)
from pec_jax.families.text import open_tower, tower_length
from pec_jax.models import hf_config
from pec_jax.models.text import TextStack
from pec_jax.types import PyTree
from pec_jax.weights.parts import open_file
from pec_jax.weights.single_files import transformer_tensors
from pec_jax.weights.tensors import WeightsError

_SCHEDULER = {  # the types of its entries
    "shift": "float",
    "base_shift": "float",
    "max_shift": "float",
    "use_dynamic_shifting": "bool",
    "num_train_timesteps": "int",
    "base_image_seq_len": "int",
    "max_image_seq_len": "int",
}


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
    transformer: str | os.PathLike[str] | None = None,
    sharding: Any = None,
    weights: bool = True,
) -> Pipeline:
    """Loads a pipeline of a known family. All files are checked before any weights are read.

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
        transformer: in place of the pipeline's own: the directory of one, or a file of weights by
            the names of diffusers or of the publisher, alone or among other parts.
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
    check_parts(root, family, ("scheduler", "vae"))
    scheduler = _read_scheduler(root, family)
    options: dict[str, Any] = {"variant": variant, "sharding": sharding, "weights": weights}
    where, file = _transformer_source(root, family, transformer)
    denoiser = open_network(
        family.transformer_network,
        where,
        dtype,
        file=file,
        param_dtype=param_dtype,
        remat=remat,
        **options,
    )
    vae = open_network(family.vae_network, root / "vae", vae_dtype, **options)
    pipeline = family(
        transformer=denoiser.module,
        transformer_variables=None,
        vae=vae.module,
        vae_variables=None,
        text=None,
        text_lengths=text_lengths(root, family, t5_length),
        scheduler=scheduler,
    )
    _check_channels(root, pipeline)
    load_text = None
    if text:
        load_text = _open_text_stack(root, dtype, t5_length=t5_length, variant=variant)
    return dataclasses.replace(
        pipeline,
        transformer_variables=denoiser.load(),
        vae_variables=vae.load(),
        text=load_text() if load_text else None,
    )


def _read_scheduler(root: Path, family: Family) -> dict[str, Any]:
    file = "scheduler_config.json"
    config = read_config(root / "scheduler", family.scheduler_class, file)
    try:
        for key in _SCHEDULER.keys() & config.keys():
            hf_config.check_value(key, config[key], _SCHEDULER[key])
    except ValueError as error:
        raise WeightsError(f"{root / 'scheduler' / file}: {error}") from error
    return config


def _transformer_source(
    root: Path, family: Family, transformer: str | os.PathLike[str] | None
) -> tuple[Path, Path | None]:
    """The directory with the transformer's config, and the file of its weights if not there too.

    Raises:
        WeightsError: there is none, or it is another family's.
    """
    if transformer is None:
        check_parts(root, family, ("transformer",))
        return root / "transformer", None
    path = Path(transformer)
    if (path / "model_index.json").is_file():
        raise WeightsError(
            f"{path}: is a whole pipeline; its transformer alone is {path / 'transformer'}"
        )
    if path.is_dir():
        return path, None
    if not path.is_file():
        raise WeightsError(f"{path}: no such file or directory; a transformer is expected there")
    tensors = transformer_tensors(open_file(path, family.transformer_network.origin))
    for other in FAMILIES:
        original = other.transformer_network.original
        if other is not family and original and original.recognises(tensors):
            raise WeightsError(
                f"{path}: holds the transformer of a {other.class_name}, but {root} is a "
                f"{family.class_name}"
            )
    return root / "transformer", path


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
    return _open_text_stack(directory, dtype, t5_length=t5_length, variant=variant)()


def _open_text_stack(
    directory: str | os.PathLike[str], dtype: Any, *, t5_length: int, variant: str
) -> Callable[[], TextStack]:
    """Opens all text encoders and checks them; what it returns reads their weights."""
    root = Path(directory)
    family = read_family(root)
    text_length = t5_length or family.text_length
    encoders = present_text_encoders(root, family)
    check_parts(root, family, [part for e in encoders for part in (e.part, e.tokenizer)])
    opened = {e.tower: open_tower(root, e, text_length, dtype, variant) for e in encoders}
    lengths = family.shared_lengths({name: tower.length for name, tower in opened.items()})

    def load() -> TextStack:
        towers = {name: tower.load(lengths[name]) for name, tower in opened.items()}
        return TextStack(towers, family.combiner(root, text_length))

    return load


def text_lengths(root: Path, family: Family, t5_length: int = 0) -> dict[str, int]:
    """Tokens of each text encoder, by tower, from the directory's small files alone.

    Args:
        root: the pipeline's directory; tokenizers and encoders may be absent.
        family: whose text encoders.
        t5_length: as in `load_pipeline`.
    """
    text_length = t5_length or family.text_length
    return family.shared_lengths(
        {e.tower: tower_length(root, e, text_length) for e in family.text_encoders}
    )
