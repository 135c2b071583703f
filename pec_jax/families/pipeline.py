"""Pipeline directories, as diffusers lays them out, read and written."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pec_jax.families.registry import Family, read_family
from pec_jax.families.text import load_text_stack
from pec_jax.io import read_json, write_json
from pec_jax.models import flux
from pec_jax.models.flux import Flux, FluxConfig
from pec_jax.models.mmdit import MMDiT, MMDiTConfig, sincos_position_table
from pec_jax.models.text import TextStack
from pec_jax.models.vae import AutoencoderKL, VAEConfig
from pec_jax.weights.convert import boxed_variables, from_torch, placed_shapes, to_torch, unbox
from pec_jax.weights.tensors import WeightsError, read_tensors, write_tensors

PyTree = Any
Transformer = MMDiT | Flux
STEM = "diffusion_pytorch_model"
TRANSFORMERS: dict[str, tuple[Any, Any]] = {
    "SD3Transformer2DModel": (MMDiT, MMDiTConfig),
    "FluxTransformer2DModel": (Flux, FluxConfig),
}
FLUX_SAMPLE_SIZE = 128  # latent pixels; in diffusers a constant of the pipeline
MAX_SIZE = 2**20  # no width, depth or table of a real model is larger


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A text-to-image model: networks, their weights, and how to sample from it.

    Attributes:
        family: what kind of pipeline it is.
        transformer: the velocity field.
        transformer_variables: {"params", "buffers"}.
        vae: the autoencoder.
        vae_variables: {"params"}.
        text: tokenizers and text encoders; None if they were not asked for.
        scheduler: scheduler_config.json, as it is.
    """

    family: Family
    transformer: Transformer
    transformer_variables: PyTree
    vae: AutoencoderKL
    vae_variables: PyTree
    text: TextStack | None
    scheduler: dict[str, Any]

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels a latent pixel, along one axis."""
        return self.vae.config.scale_factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.vae.config.latent_channels

    @property
    def patch_size(self) -> int:
        """Latent pixels an image token, along one axis."""
        config = self.transformer.config
        return flux.PACK if isinstance(config, FluxConfig) else config.patch_size

    @property
    def default_size(self) -> int:
        """Height and width of an image, in pixels, that the model was trained for."""
        config = self.transformer.config
        size = FLUX_SAMPLE_SIZE if isinstance(config, FluxConfig) else config.sample_size
        return size * self.vae_scale_factor

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the transformer."""
        config = self.transformer.config
        return isinstance(config, FluxConfig) and config.guidance_embeds


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


def transformer_boxes(module: Transformer) -> PyTree:
    """Shapes and logical axes of a transformer's variables, {"params", "buffers"}, in boxes."""
    c = module.config
    text = _shape(1, 1, c.joint_attention_dim), _shape(1, c.pooled_projection_dim)
    if isinstance(c, FluxConfig):
        latents = _shape(1, flux.PACK, flux.PACK, c.latent_channels)
        guidance = (_shape(1),) if c.guidance_embeds else ()
        return boxed_variables(module, latents, _shape(1), *text, *guidance)
    latents = _shape(1, c.patch_size, c.patch_size, c.in_channels)
    return boxed_variables(module, latents, _shape(1), *text)


def transformer_shapes(module: Transformer) -> PyTree:
    """The shapes of a transformer's variables, {"params", "buffers"}; no memory is taken."""
    return unbox(transformer_boxes(module))


def transformer_buffers(module: Transformer) -> PyTree:
    """What an SD3 transformer stores beside its parameters: the table of positions."""
    c = module.config
    table = sincos_position_table(c.inner_dim, c.pos_embed_max_size, c.sample_size // c.patch_size)
    return {"pos_embed": {"pos_embed": table}}


def vae_boxes(module: AutoencoderKL) -> PyTree:
    """Shapes and logical axes of an autoencoder's variables, {"params"}, in boxes."""
    factor = module.config.scale_factor
    return boxed_variables(module, _shape(1, factor, factor, module.config.in_channels))


def vae_shapes(module: AutoencoderKL) -> PyTree:
    """The shapes of an autoencoder's variables, {"params"}; no memory is taken."""
    return unbox(vae_boxes(module))


def load_transformer_config(
    directory: Path, dtype: Any = jnp.float32, *, remat: str = "none"
) -> Transformer:
    """The network that a transformer directory's config.json describes, without weights.

    Raises:
        WeightsError: unreadable, or of an architecture that is not supported.
    """
    path = directory / "config.json"
    name = read_json(path).get("_class_name", "SD3Transformer2DModel")
    if name not in TRANSFORMERS:
        raise WeightsError(f"{path}: is a {name}; supported: {', '.join(TRANSFORMERS)}")
    network, config_class = TRANSFORMERS[name]
    return network(_parse(config_class, directory, name), dtype=dtype, remat=remat)


def load_transformer(
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    param_dtype: Any = jnp.float32,
    remat: str = "none",
    variant: str = "",
    sharding: Any = None,
    weights: bool = True,
) -> tuple[Transformer, PyTree]:
    """Loads a transformer directory (config.json and its weights).

    Args:
        directory: such as PIPELINE/transformer.
        dtype: in which the network computes.
        param_dtype: in which its parameters are kept.
        remat: what the backward pass computes again, of `layers.REMAT`.
        variant: such as "fp16", where there are several files of weights.
        sharding: where the variables go, a sharding for all or a `Placement`; None keeps them in
            host memory, as numpy arrays.
        weights: False reads config.json alone and gives the variables' shapes.

    Returns:
        (network, variables).

    Raises:
        WeightsError: anything missing, left over, misshapen or unsupported, by name.
    """
    directory = Path(directory)
    module = load_transformer_config(directory, dtype, remat=remat)
    boxes = transformer_boxes(module)
    if not weights:
        return module, placed_shapes(boxes, dtype=param_dtype, sharding=sharding)
    tensors = read_tensors(directory, STEM, variant)
    return module, from_torch(tensors, boxes, dtype=param_dtype, sharding=sharding)


def load_vae(
    directory: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    variant: str = "",
    sharding: Any = None,
    weights: bool = True,
) -> tuple[AutoencoderKL, PyTree]:
    """Loads an autoencoder directory (config.json and its weights).

    Args:
        directory: such as PIPELINE/vae.
        dtype: in which the network computes; its parameters are fp32.
        variant: such as "fp16", where there are several files of weights.
        sharding: where the variables go, a sharding for all or a `Placement`; None keeps them in
            host memory, as numpy arrays.
        weights: False reads config.json alone and gives the variables' shapes.

    Returns:
        (network, variables).

    Raises:
        WeightsError: anything missing, left over, misshapen or unsupported, by name.
    """
    directory = Path(directory)
    module = AutoencoderKL(_parse(VAEConfig, directory, "AutoencoderKL"), dtype=dtype)
    if not weights:
        return module, placed_shapes(vae_boxes(module), sharding=sharding)
    tensors = read_tensors(directory, STEM, variant)
    return module, from_torch(tensors, vae_boxes(module), sharding=sharding)


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
    """Loads a Stable Diffusion 3 or FLUX.1 pipeline from a directory in diffusers' layout.

    Args:
        directory: holds model_index.json and a directory for each part it names.
        dtype: in which the transformer and the text encoders compute.
        text: load the text encoders too; False where prompts are embedded already.
        t5_length: tokens that T5 sees; 0 is diffusers' own choice.
        param_dtype: in which the transformer's parameters are kept.
        vae_dtype: in which the autoencoder computes.
        remat: what of the transformer the backward pass computes again, of `layers.REMAT`.
        variant: such as "fp16", where there are several files of weights.
        sharding: where the variables of transformer and autoencoder go, tensor by tensor; None
            keeps them in host memory, as numpy arrays.
        weights: False reads config files alone and gives the variables' shapes.

    Returns:
        The pipeline.

    Raises:
        WeightsError: a part is missing, of an unsupported class, or its weights do not fit; the
            message names file and tensor.
    """
    root = Path(directory)
    family = read_family(root)
    scheduler = read_config(root / "scheduler", family.parts["scheduler"], "scheduler_config.json")
    read_config(root / "transformer", family.parts["transformer"])  # families are not mixed
    transformer, transformer_variables = load_transformer(
        root / "transformer",
        dtype,
        param_dtype=param_dtype,
        remat=remat,
        variant=variant,
        sharding=sharding,
        weights=weights,
    )
    vae, vae_variables = load_vae(
        root / "vae", vae_dtype, variant=variant, sharding=sharding, weights=weights
    )
    _check_channels(root, transformer, vae)
    return Pipeline(
        family=family,
        transformer=transformer,
        transformer_variables=transformer_variables,
        vae=vae,
        vae_variables=vae_variables,
        text=load_text_stack(root, dtype, t5_length=t5_length, variant=variant) if text else None,
        scheduler=scheduler,
    )


def _check_channels(root: Path, transformer: Transformer, vae: AutoencoderKL) -> None:
    config, area = transformer.config, 1
    if isinstance(config, FluxConfig):
        area = flux.PACK**2
    channels = (config.in_channels, config.out_channels)
    if channels != (vae.config.latent_channels * area,) * 2:
        raise WeightsError(
            f"{root}: the transformer takes {channels[0] // area} and gives "
            f"{channels[1] // area} channels, the autoencoder has {vae.config.latent_channels}; "
            "they belong to different models"
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
