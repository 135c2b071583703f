"""The networks of a pipeline directory: a config.json and its weights, read and written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pec_jax.io import read_json, write_json
from pec_jax.models import hf_config
from pec_jax.models.vae import AutoencoderKL, VAEConfig
from pec_jax.types import PyTree
from pec_jax.weights.convert import (
    boxed_variables,
    check_tensors,
    from_torch,
    placed_shapes,
    to_torch,
    unbox,
)
from pec_jax.weights.layouts import unwrapped
from pec_jax.weights.parts import open_file, open_part
from pec_jax.weights.single_files import Original, transformer_tensors
from pec_jax.weights.tensors import Tensors, WeightsError, write_tensors

STEM = "diffusion_pytorch_model"


@dataclasses.dataclass(frozen=True)
class Network:
    """One class of networks that diffusers stores in a directory.

    Attributes:
        class_name: diffusers' class, which config.json and model_index.json name.
        module: (config, dtype=..., and options of its own) -> linen module with these as fields.
        config: dataclass of config.json's fields, with `from_dict`.
        inputs: config -> the shapes of a smallest call, which fix those of the variables.
        buffers: module -> the values of the collection "buffers" of a new network; {} if none.
        original: the names of its tensors in its publisher's single file; None if there is none.
        origin: a hub id that has such a network in diffusers' layout.
    """

    class_name: str
    module: Callable[..., nn.Module]
    config: Any
    inputs: Callable[[Any], tuple[Any, ...]]
    buffers: Callable[[Any], PyTree] = lambda module: {}
    original: Original | None = None
    origin: str = ""

    def boxes(self, module: Any) -> PyTree:
        """Shapes and logical axes of a module's variables, in linen's boxes; takes no memory."""
        return boxed_variables(module, *self.inputs(module.config))

    def named(self, tensors: Tensors) -> Tensors:
        """The network's tensors by diffusers' names, from those of a wrapper or its publisher."""
        if self.original is None:
            return unwrapped(tensors)
        return self.original.to_diffusers(transformer_tensors(tensors))

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


@dataclasses.dataclass(frozen=True)
class Opened:
    """A network whose files have been found to fit each other, before its weights are read.

    Attributes:
        module: the network.
        load: reads its variables, or their shapes.
    """

    module: Any
    load: Callable[[], PyTree]


def open_network(
    network: Network,
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    file: Path | None = None,
    param_dtype: Any = None,
    variant: str = "",
    sharding: Any = None,
    weights: bool = True,
    **options: Any,
) -> Opened:
    """Opens a network's directory (config.json and its weights) and checks it; nothing is large.

    Args:
        network: the class it must be of.
        directory: such as PIPELINE/vae.
        dtype: in which the network computes.
        file: the file of weights to read, in place of the directory's; the publisher's names will
            do as well as diffusers'.
        param_dtype: in which its parameters are kept; None is fp32.
        variant: such as "fp16", where there are several files of weights.
        sharding: where the variables go, a sharding for all or a `Placement`; None keeps them in
            host memory, as numpy arrays.
        weights: False reads config.json alone, and loads the variables' shapes.
        **options: further fields of the module, such as `remat`.

    Raises:
        WeightsError: anything missing, left over, misshapen or unsupported, by name.
    """
    directory = Path(directory)
    tensors: Tensors | None = None
    if weights and file is not None:
        tensors = open_file(file, network.origin)
    elif weights:
        tensors = open_part(directory, STEM, variant, network.origin)
    module = load_module(network, directory, dtype, **options)
    boxes = network.boxes(module)
    if tensors is None:
        return Opened(module, lambda: placed_shapes(boxes, dtype=param_dtype, sharding=sharding))
    named = network.named(tensors)
    check_tensors(named, boxes)
    return Opened(module, lambda: from_torch(named, boxes, dtype=param_dtype, sharding=sharding))


def load_network(
    network: Network, directory: str | os.PathLike[str], dtype: Any = jnp.float32, **options: Any
) -> tuple[Any, PyTree]:
    """Loads a network's directory.

    Args and Raises: as `open_network`.

    Returns:
        (module, variables).
    """
    opened = open_network(network, directory, dtype, **options)
    return opened.module, opened.load()


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
    values = read_config(directory, class_name)
    values = {key: value for key, value in values.items() if value is not None}
    try:
        hf_config.check_fields(config_class, values)
        return config_class.from_dict(values)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{directory / 'config.json'}: {error}") from error


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
