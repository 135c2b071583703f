"""The networks of a pipeline directory: a config.json and its weights, read and written."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pec_jax.io import read_json, write_json
from pec_jax.models.vae import AutoencoderKL, VAEConfig
from pec_jax.types import PyTree
from pec_jax.weights.convert import boxed_variables, from_torch, placed_shapes, to_torch, unbox
from pec_jax.weights.tensors import WeightsError, read_tensors, write_tensors

STEM = "diffusion_pytorch_model"
MAX_SIZE = 2**20  # no width, depth or table of a real model is larger


@dataclasses.dataclass(frozen=True)
class Network:
    """One class of networks that diffusers stores in a directory.

    Attributes:
        class_name: diffusers' class, which config.json and model_index.json name.
        module: (config, dtype=..., and options of its own) -> linen module with these as fields.
        config: dataclass of config.json's fields, with `from_dict`.
        inputs: config -> the shapes of a smallest call, which fix those of the variables.
        buffers: module -> the values of the collection "buffers" of a new network; {} if none.
    """

    class_name: str
    module: Callable[..., nn.Module]
    config: Any
    inputs: Callable[[Any], tuple[Any, ...]]
    buffers: Callable[[Any], PyTree] = lambda module: {}

    def boxes(self, module: Any) -> PyTree:
        """Shapes and logical axes of a module's variables, in linen's boxes; takes no memory."""
        return boxed_variables(module, *self.inputs(module.config))

    def shapes(self, module: Any) -> PyTree:
        """The shapes of a module's variables, {"params", "buffers"}; takes no memory."""
        return unbox(self.boxes(module))


def float_shape(*sizes: int) -> Any:
    """A `jax.ShapeDtypeStruct` that stands for a float32 array."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _image_inputs(config: VAEConfig) -> tuple[Any, ...]:
    return (float_shape(1, config.scale_factor, config.scale_factor, config.in_channels),)


AUTOENCODER_KL = Network("AutoencoderKL", AutoencoderKL, VAEConfig, _image_inputs)
# What the 16-channel autoencoders of Stable Diffusion 3 and FLUX.1 have in common.
PUBLISHED_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def load_network(
    network: Network,
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    param_dtype: Any = None,
    variant: str = "",
    sharding: Any = None,
    weights: bool = True,
    **options: Any,
) -> tuple[Any, PyTree]:
    """Loads a network's directory (config.json and its weights).

    Args:
        network: the class it must be of.
        directory: such as PIPELINE/vae.
        dtype: in which the network computes.
        param_dtype: in which its parameters are kept; None is fp32.
        variant: such as "fp16", where there are several files of weights.
        sharding: where the variables go, a sharding for all or a `Placement`; None keeps them in
            host memory, as numpy arrays.
        weights: False reads config.json alone and returns the variables' shapes.
        **options: further fields of the module, such as `remat`.

    Returns:
        (module, variables).

    Raises:
        WeightsError: anything missing, left over, misshapen or unsupported, by name.
    """
    directory = Path(directory)
    module = load_module(network, directory, dtype, **options)
    boxes = network.boxes(module)
    if not weights:
        return module, placed_shapes(boxes, dtype=param_dtype, sharding=sharding)
    tensors = read_tensors(directory, STEM, variant)
    return module, from_torch(tensors, boxes, dtype=param_dtype, sharding=sharding)


def load_module(network: Network, directory: Path, dtype: Any = jnp.float32, **options: Any) -> Any:
    """The module that a directory's config.json describes, without weights.

    Raises:
        WeightsError: unreadable, of another class, or of an architecture that is not supported.
    """
    config = _parse(network.config, directory, network.class_name)
    return network.module(config, dtype=dtype, **options)


def read_config(directory: Path, class_name: str, file: str = "config.json") -> dict[str, Any]:
    """Reads a component's config and checks its class, where the config names one.

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


def save_network(
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
