"""Stable Diffusion 3 pipeline directories, as diffusers lays them out, read and written."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pec_jax.models.mmdit import MMDiT, MMDiTConfig
from pec_jax.models.text import TextStack
from pec_jax.models.vae import AutoencoderKL, VAEConfig
from pec_jax.weights.convert import abstract_variables, from_torch, to_torch
from pec_jax.weights.tensors import (
    WeightsError,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from pec_jax.weights.text import load_text_stack

PyTree = Any
STEM = "diffusion_pytorch_model"
# Component -> the class that model_index.json must give it. (Tokenizers come in several classes,
# slow and fast, which all read the same files.)
CLASSES = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
TEXT_CLASSES = {
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}
MAX_SIZE = 2**20  # no width, depth or table of a real model is larger


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A text-to-image model: networks, their weights, and how to sample from it.

    Attributes:
        transformer: the velocity field.
        transformer_variables: {"params", "buffers"}, numpy arrays in host memory.
        vae: the autoencoder.
        vae_variables: {"params"}, numpy arrays in host memory.
        text: tokenizers and text encoders; None if they were not asked for.
        scheduler: scheduler_config.json, as it is.
        vae_scale_factor: image pixels a latent pixel, along one axis.
        latent_channels: channels of the latents.
        default_size: height and width of an image, in pixels, that the model was trained for.
    """

    transformer: MMDiT
    transformer_variables: PyTree
    vae: AutoencoderKL
    vae_variables: PyTree
    text: TextStack | None
    scheduler: dict[str, Any]
    vae_scale_factor: int
    latent_channels: int
    default_size: int


def read_config(directory: Path, class_name: str, file: str = "config.json") -> dict[str, Any]:
    """Reads a component's config and checks its class, where it gives one.

    Args:
        directory: the component's directory.
        class_name: the class that the config must name under "_class_name".
        file: the config's file name.

    Returns:
        The config.

    Raises:
        WeightsError: unreadable, or of another class.
    """
    path = directory / file
    config = read_json(path)
    found = config.get("_class_name", class_name)
    if found != class_name:
        raise WeightsError(f"{path}: is a {found}; supported: {class_name}")
    return config


def _parse(config_class: Any, directory: Path, class_name: str) -> Any:
    """The component's config as a dataclass, with every number of the right type and range."""
    path = directory / "config.json"
    values = read_config(directory, class_name)
    for field in dataclasses.fields(config_class):
        value = values.get(field.name)
        if value is None:
            continue  # the default, or None where the field allows it
        for item in (
            value if field.type.startswith("tuple") and isinstance(value, list) else [value]
        ):
            if "int" in field.type and not _is_size(item):
                raise WeightsError(
                    f"{path}: {field.name} {value!r} must hold whole numbers from 0 to {MAX_SIZE}"
                )
            if field.type == "float" and not _is_finite(item):
                raise WeightsError(f"{path}: {field.name} {value!r} must be a finite number")
    try:
        return config_class.from_dict(values)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def transformer_shapes(module: MMDiT) -> PyTree:
    """The shapes of an MMDiT's variables, {"params", "buffers"}; no memory is taken."""
    c, p = module.config, module.config.patch_size
    return abstract_variables(
        module,
        _shape(1, p, p, c.in_channels),
        _shape(1),
        _shape(1, 1, c.joint_attention_dim),
        _shape(1, c.pooled_projection_dim),
    )


def vae_shapes(module: AutoencoderKL) -> PyTree:
    """The shapes of an autoencoder's variables, {"params"}; no memory is taken."""
    factor = module.config.scale_factor
    return abstract_variables(module, _shape(1, factor, factor, module.config.in_channels))


def load_transformer(
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> tuple[MMDiT, PyTree]:
    """Loads a transformer directory (config.json and its weights).

    Args:
        directory: such as PIPELINE/transformer.
        dtype: in which the network computes.
        param_dtype: in which its parameters are kept.
        remat: recompute activations in the backward pass, for less memory.

    Returns:
        (network, variables); the variables are numpy arrays in host memory.

    Raises:
        WeightsError: anything missing, left over, misshapen or unsupported, by name.
    """
    directory = Path(directory)
    config = _parse(MMDiTConfig, directory, CLASSES["transformer"])
    module = MMDiT(config, dtype=dtype, remat=remat)
    tensors = read_tensors(directory, STEM)
    return module, from_torch(tensors, transformer_shapes(module), dtype=param_dtype)


def load_vae(
    directory: str | os.PathLike[str], dtype: Any = jnp.float32
) -> tuple[AutoencoderKL, PyTree]:
    """Loads an autoencoder directory (config.json and its weights).

    Args:
        directory: such as PIPELINE/vae.
        dtype: in which the network computes; its parameters are fp32.

    Returns:
        (network, variables); the variables are numpy arrays in host memory.

    Raises:
        WeightsError: anything missing, left over, misshapen or unsupported, by name.
    """
    directory = Path(directory)
    module = AutoencoderKL(_parse(VAEConfig, directory, CLASSES["vae"]), dtype=dtype)
    return module, from_torch(read_tensors(directory, STEM), vae_shapes(module))


def check_index(directory: Path, *, text: bool) -> None:
    """Checks that a directory is a Stable Diffusion 3 pipeline with the parts asked for.

    Args:
        directory: holds model_index.json.
        text: whether the text encoders are needed.

    Raises:
        WeightsError: no model_index.json, another pipeline class, or another class of a part.
    """
    path = directory / "model_index.json"
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such model directory")
    index = read_json(path)
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise WeightsError(
            f"{path}: is a {index.get('_class_name')}; supported: StableDiffusion3Pipeline"
        )
    expected = {**CLASSES, **(TEXT_CLASSES if text else {})}
    for part, class_name in expected.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != class_name:
            raise WeightsError(
                f"{path}: {part} is {'absent' if found is None else f'a {found}'}; "
                f"supported: {class_name}"
            )


def load_pipeline(
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    text: bool = True,
    param_dtype: Any = jnp.float32,
    vae_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Pipeline:
    """Loads a Stable Diffusion 3 pipeline from a directory in diffusers' layout.

    Args:
        directory: holds model_index.json, transformer/, vae/, scheduler/ and, if `text`,
            text_encoder{,_2,_3}/ and tokenizer{,_2,_3}/.
        dtype: in which the transformer and the text encoders compute.
        text: load the text encoders too; False where prompts are embedded already.
        param_dtype: in which the transformer's parameters are kept.
        vae_dtype: in which the autoencoder computes.
        remat: recompute the transformer's activations in the backward pass.

    Returns:
        The pipeline; the weights of transformer and autoencoder are still in host memory.

    Raises:
        WeightsError: a part is missing, of an unsupported class, or its weights do not fit; the
            message names file and tensor.
    """
    root = Path(directory)
    check_index(root, text=text)
    scheduler = read_config(root / "scheduler", CLASSES["scheduler"], "scheduler_config.json")
    transformer, transformer_variables = load_transformer(
        root / "transformer", dtype, param_dtype=param_dtype, remat=remat
    )
    vae, vae_variables = load_vae(root / "vae", vae_dtype)
    channels = (transformer.config.in_channels, transformer.config.out_channels)
    if channels != (vae.config.latent_channels,) * 2:
        raise WeightsError(
            f"{root}: the transformer takes {channels[0]} and gives {channels[1]} channels, the "
            f"autoencoder has {vae.config.latent_channels}; they belong to different models"
        )
    return Pipeline(
        transformer=transformer,
        transformer_variables=transformer_variables,
        vae=vae,
        vae_variables=vae_variables,
        text=load_text_stack(root, dtype) if text else None,
        scheduler=scheduler,
        vae_scale_factor=vae.config.scale_factor,
        latent_channels=vae.config.latent_channels,
        default_size=transformer.config.sample_size * vae.config.scale_factor,
    )


def save_component(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    variables: PyTree,
    stem: str = STEM,
) -> None:
    """Writes config.json and STEM.safetensors, each whole or not at all.

    Args:
        directory: the component's directory, created if absent.
        config: what config.json shall hold, as diffusers or transformers write it.
        variables: {"params": ..., "buffers": ...}; other collections are left out.
        stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).

    Raises:
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    # Weights first: a directory with a config but no weights would look like a broken download.
    write_tensors(directory, to_torch(variables), stem)
    write_json(directory / "config.json", config)
