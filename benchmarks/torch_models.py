"""The same networks in torch: diffusers' and transformers' own classes with the same weights.

Only the LoRA layer is ours: peft's does the same, with more around it.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.setups import Setup
from pec_jax.config import Config, ConfigError
from pec_jax.io import read_json
from pec_jax.perception.preprocessing import Preprocessor
from pec_jax.profiling.aot import config_files
from pec_jax.types import PyTree
from pec_jax.weights.convert import to_torch
from pec_jax.weights.lora_files import lora_to_torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NETWORKS = {c.__name__: c for c in (diffusers.SD3Transformer2DModel, diffusers.AutoencoderKL)}
_ENCODERS: dict[str, tuple[Any, Any]] = {
    "clip": (transformers.CLIPConfig, transformers.CLIPModel),
    "vit": (transformers.ViTConfig, transformers.ViTModel),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
}
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()  # the text towers are absent, which is no news
_MODES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, with A and B in fp32 and cast where they are used."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        low = functional.linear(x, self.lora_A.to(x.dtype))
        return self.base(x) + functional.linear(low, (self.lora_B * self.scale).to(x.dtype))


@dataclasses.dataclass(frozen=True)
class Models:
    """The frozen networks, and the LoRA inside of one of them."""

    transformer: nn.Module
    vae: nn.Module
    encoders: dict[str, nn.Module]  # those that the step looks through, by our networks' keys
    preprocess: dict[str, Preprocessor]  # of each encoder
    lora: dict[str, nn.Parameter]  # by the names of a LoRA file, without the prefix
    device: torch.device


def load(setup: Setup, device: torch.device, *, drawn: bool = False) -> Models:
    """The setup's networks, from the config files of its models and its own arrays.

    Args:
      setup: what ours runs with.
      device: for all of them.
      drawn: keeps the random numbers of a new network instead of copying the setup's: at full size
        that takes half a minute less, and no time depends on them.

    Raises:
      ConfigError: not Stable Diffusion 3 with a LoRA, or an encoder of another kind.
    """
    config = setup.config
    _check(config)
    encoders, preprocess = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        root = config_files(config.model.path, Path(scratch) / "pipeline", pipeline=True)
        frozen = {} if drawn else {"transformer": setup.frozen.transformer, "vae": setup.frozen.vae}
        transformer = _diffusers(
            root / "transformer", frozen.get("transformer"), config.model.dtype, device
        )
        vae = _diffusers(root / "vae", frozen.get("vae"), config.model.vae_dtype, device)
        for key, (name, model) in _networks(setup).items():
            directory = root / "encoders" / name
            if model:
                directory = config_files(model, Path(scratch) / name, pipeline=False)
            variables = None if drawn else setup.frozen.networks[key]
            with device:
                encoders[key], preprocess[key] = _encoder(directory, variables)
            encoders[key].to(device, DTYPES[config.model.encoder_dtype])
    if config.model.remat == "full":
        transformer.enable_gradient_checkpointing()
    # Convolutions are faster with channels last, as they are in ours.
    vae.to(device, memory_format=torch.channels_last)
    lora = add_lora(transformer, config)
    set_lora(lora, setup.params)
    return Models(transformer, vae, encoders, preprocess, lora, device)


def _networks(setup: Setup) -> dict[str, tuple[str, str]]:
    """Key of each network that the step looks through -> its name, and its model in the config."""
    config, scorer = setup.config, setup.program.scorer
    spaces = {space.network: (n, config.encoders[n].model) for n, space in scorer.spaces.items()}
    rewards = scorer.reward.rewards.items()
    return spaces | {reward.network: (n, config.rewards[n].model) for n, reward in rewards}


def _check(config: Config) -> None:
    if config.trainable.mode != "lora":
        raise ConfigError("--torch trains a LoRA only: set config.trainable.mode=lora.")
    if config.model.remat == "dots":
        raise ConfigError("--torch has nothing like config.model.remat=dots: use none or full.")


def _diffusers(
    directory: Path, variables: PyTree | None, dtype: str, device: torch.device
) -> nn.Module:
    """The network of a directory's config.json, with these weights or with new ones."""
    config, found = read_json(directory / "config.json"), None
    network = _NETWORKS.get(name := config.get("_class_name"))
    if network is None:
        raise ConfigError(
            f"--torch knows {', '.join(_NETWORKS)}, but {directory.name} is a {name}: leave "
            "--torch out."
        )
    with device:  # where numbers are drawn faster than on the host
        module = network.from_config(config)
    if variables is not None:
        found = module.load_state_dict(_tensors(variables), strict=False, assign=True)
        parameters = {name for name, _ in module.named_parameters()}
        _complain(network, [*parameters & set(found.missing_keys), *found.unexpected_keys])
    return module.to(device, DTYPES[dtype]).requires_grad_(False).eval()


def _encoder(directory: Path, variables: PyTree | None) -> tuple[nn.Module, Preprocessor]:
    config = read_json(directory / "config.json")
    kind = config["model_type"]
    if kind not in _ENCODERS:
        raise ConfigError(f"--torch knows encoders of kind {', '.join(_ENCODERS)}, not {kind}.")
    if "text_config" in config:  # nothing is ever encoded by it, and to draw its numbers takes time
        config["text_config"] |= {"num_hidden_layers": 1}
    config_class, network = _ENCODERS[kind]
    settings = config_class.from_dict(config)
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    if variables is None:
        module = network(settings, **options)
    else:
        # The files' names of tensors are not those of the module: its loader translates them.
        module, found = network.from_pretrained(
            None,
            config=settings,
            state_dict=_tensors(variables),
            output_loading_info=True,
            **options,
        )
        missing = {name for name in found["missing_keys"] if not name.startswith("text_")}  # unused
        missing -= {"embeddings.mask_token"}
        _complain(network, [*missing, *found["unexpected_keys"]])
    preprocess = Preprocessor.from_dict(read_json(directory / "preprocessor_config.json"), kind)
    return module.requires_grad_(False).eval(), preprocess


def _tensors(variables: PyTree) -> dict[str, Tensor]:
    return {name: to_tensor(array) for name, array in to_torch(variables).items()}


def _complain(network: Any, names: Sequence[str]) -> None:
    if names:
        raise ConfigError(
            f"{network.__name__} and our network differ in {sorted(names)[:5]}: --torch cannot "
            "compare them."
        )


def to_tensor(array: Any) -> Tensor:
    """A NumPy array, bfloat16 too, as a tensor of its own on the CPU."""
    array = np.array(array)
    if array.dtype.name == "bfloat16":  # torch does not read NumPy's extension types
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def shared_copy(module: nn.Module) -> nn.Module:
    """Modules of their own around the same parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def add_lora(transformer: nn.Module, config: Config) -> dict[str, nn.Parameter]:
    """Puts a LoRA beside every linear layer that the config's patterns match.

    Returns:
      MODULE.lora_A.weight and MODULE.lora_B.weight -> parameter.
    """
    trainable, parameters = config.trainable, {}
    for name, module in list(transformer.named_modules()):
        if not isinstance(module, nn.Linear) or not _matches(trainable.targets, name):
            continue
        layer = LoRALinear(module, trainable.rank, trainable.alpha)
        parent, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(parent), last, layer)
        parameters[f"{name}.lora_A.weight"] = layer.lora_A
        parameters[f"{name}.lora_B.weight"] = layer.lora_B
    return parameters


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


@torch.no_grad()
def set_lora(lora: dict[str, nn.Parameter], params: PyTree) -> None:
    """Copies our adapters' values over.

    Raises:
      ConfigError: other layers are adapted here than there.
    """
    values = {n.removeprefix("transformer."): a for n, a in lora_to_torch(params).items()}
    if set(values) != set(lora):
        raise ConfigError(
            "config.trainable.targets matches other layers in diffusers' network: "
            f"{sorted(set(values) ^ set(lora))[:5]}."
        )
    for name, parameter in lora.items():
        parameter.copy_(to_tensor(values[name]))


def as_8bit(images: Tensor) -> Tensor:
    """Images in [0, 1] to the values that a saved PNG would hold."""
    return torch.round(images.float().clamp(0.0, 1.0) * 255.0) / 255.0


def preprocessed(settings: Preprocessor, images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] as an encoder takes them, float32.

    Resized with antialiasing and rounded to 8 bits, once and not after each axis as Pillow does
    it: a level here and there differs where anything is resized.
    """
    size = settings._resized(*images.shape[2:])
    if size != tuple(images.shape[2:]):
        mode = _MODES[settings.resample]
        images = as_8bit(functional.interpolate(images, size=size, mode=mode, antialias=True))
    if settings.crop is not None:
        (height, width), (rows, columns) = images.shape[2:], settings.crop
        top, left = (height - rows) // 2, (width - columns) // 2
        images = images[:, :, top : top + rows, left : left + columns]
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (settings.mean, settings.std)
    )
    return (images * settings.scale - mean) / std


def features(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Preprocessed images [N, 3, h, w] -> features [N, d] float32, as the model gives them."""
    pixels = pixels.to(next(encoder.parameters()).dtype)
    if hasattr(encoder, "get_image_features"):
        return encoder.get_image_features(pixels).pooler_output.float()
    return encoder(pixels).last_hidden_state[:, 0].float()
