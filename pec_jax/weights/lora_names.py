"""Whose names a LoRA file has, and which layers of the network they mean.

Known are the spellings of PEFT and of diffusers, new and old; of kohya's sd-scripts and OneTrainer,
which have `_` for every `.` of a module; of ComfyUI and torch.compile, which put a prefix before;
of XLabs; and the names of the models' own code, where a layer may be several of ours, one below the
other.

Source of the names: diffusers 0.42, loaders/lora_conversion_utils.py and single_file_utils.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from pec_jax.weights.layouts import COMPILED

# The parts of a layer's adapter, by PEFT's names.
A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
MAGNITUDE, ALPHA = "lora_magnitude_vector", "alpha"
PEFT_PREFIX = "base_model.model."

_PREFIXES = re.compile(
    rf"(?:module\.|{re.escape(PEFT_PREFIX)}|(?:model\.)?diffusion_model\.|transformer\."
    r"|lora_unet_|lora_transformer_)*"
)
_SPELLINGS = tuple(  # rewritten one after the other; ".lora.down" and ".lora.up" are diffusers' old
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1\.", r"\1.img_attn.\2.lora."),
        (r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2\.", r"\1.txt_attn.\2.lora."),
        (r"(single_blocks\.\d+)\.processor\.qkv_lora\.", r"\1.qkv.lora."),
        (r"(single_blocks\.\d+)\.processor\.proj_lora\.", r"\1.linear2.lora."),
        (r"\.processor\.", "."),
        (r"\.(to_[qkv])_lora\.", r".\1.lora."),
        (r"\.to_out_lora\.", ".to_out.0.lora."),
    )
)
_ADAPTER = r"(?:\.[\w-]+)?"  # the adapter's name in PEFT, such as "default"
_PARTS = {
    part: re.compile(rf"(.+)\.(?:{pattern})")
    for part, pattern in {
        A: rf"lora_A{_ADAPTER}\.weight|lora_down\.weight|lora\.down\.weight",
        B: rf"lora_B{_ADAPTER}\.weight|lora_up\.weight|lora\.up\.weight",
        BIAS: rf"lora_B{_ADAPTER}\.bias",
        MAGNITUDE: rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
        ALPHA: "alpha",
    }.items()
}
_TEXT_ENCODER = re.compile(r"(?:text_encoders?(?:_\d)?\.|lora_te\d*_)")
_OTHER_KINDS = {  # what a name ends with -> what that is
    r"lokr_\w+": "LoKr",
    r"hada_\w+": "LoHa",
    r"oft_\w+(\.weight)?": "OFT",
    r"dora_scale": "DoRA as LyCORIS writes it, of which diffusers leaves out dora_scale",
    r"lora_mid\.weight": "a LoRA of convolutions",
    r"lora_embedding_[AB].*": "a LoRA of embeddings",
    r"(query|key)_norm\.scale": "new weights of a norm, as in the control LoRAs of FLUX.1",
    r"diff(_b)?": "the change of a whole tensor, which diffusers leaves out",
}

# A layer's name in the models' own code, # being a number; our module; our layers in it, in the
# order of the rows of its weight. FLUX.1 (black-forest-labs/flux) and SD3 (Stability-AI/sd3.5).
_BLOCK, _SINGLE = "transformer_blocks.#.", "single_transformer_blocks.#."
_QKV, _ADDED = "to_q to_k to_v", "add_q_proj add_k_proj add_v_proj"
_ORIGINALS = (
    ("double_blocks.#.img_attn.qkv", _BLOCK + "attn.", _QKV),
    ("double_blocks.#.img_attn.proj", _BLOCK + "attn.", "to_out.0"),
    ("double_blocks.#.txt_attn.qkv", _BLOCK + "attn.", _ADDED),
    ("double_blocks.#.txt_attn.proj", _BLOCK + "attn.", "to_add_out"),
    ("double_blocks.#.img_mlp.0", _BLOCK + "ff.net.", "0.proj"),
    ("double_blocks.#.img_mlp.2", _BLOCK + "ff.net.", "2"),
    ("double_blocks.#.txt_mlp.0", _BLOCK + "ff_context.net.", "0.proj"),
    ("double_blocks.#.txt_mlp.2", _BLOCK + "ff_context.net.", "2"),
    ("double_blocks.#.img_mod.lin", _BLOCK + "norm1.", "linear"),
    ("double_blocks.#.txt_mod.lin", _BLOCK + "norm1_context.", "linear"),
    ("single_blocks.#.qkv", _SINGLE + "attn.", _QKV),  # XLabs
    ("single_blocks.#.linear1", _SINGLE, "attn.to_q attn.to_k attn.to_v proj_mlp"),
    ("single_blocks.#.linear2", _SINGLE, "proj_out"),
    ("single_blocks.#.modulation.lin", _SINGLE + "norm.", "linear"),
    ("img_in", "", "x_embedder"),
    ("txt_in", "", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.", "linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.", "linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.", "linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.", "linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.", "linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.", "linear_2"),
    ("joint_blocks.#.x_block.attn.qkv", _BLOCK + "attn.", _QKV),
    ("joint_blocks.#.x_block.attn.proj", _BLOCK + "attn.", "to_out.0"),
    ("joint_blocks.#.x_block.attn2.qkv", _BLOCK + "attn2.", _QKV),
    ("joint_blocks.#.x_block.attn2.proj", _BLOCK + "attn2.", "to_out.0"),
    ("joint_blocks.#.x_block.mlp.fc1", _BLOCK + "ff.net.", "0.proj"),
    ("joint_blocks.#.x_block.mlp.fc2", _BLOCK + "ff.net.", "2"),
    ("joint_blocks.#.x_block.adaLN_modulation.1", _BLOCK + "norm1.", "linear"),
    ("joint_blocks.#.context_block.attn.qkv", _BLOCK + "attn.", _ADDED),
    ("joint_blocks.#.context_block.attn.proj", _BLOCK + "attn.", "to_add_out"),
    ("joint_blocks.#.context_block.mlp.fc1", _BLOCK + "ff_context.net.", "0.proj"),
    ("joint_blocks.#.context_block.mlp.fc2", _BLOCK + "ff_context.net.", "2"),
    ("joint_blocks.#.context_block.adaLN_modulation.1", _BLOCK + "norm1_context.", "linear"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.", "linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.", "linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.", "linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.", "linear_2"),
    ("final_layer.linear", "", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.", "linear"),
)
_PATTERNS = tuple(
    (
        re.compile(re.escape(theirs).replace(r"\.", "[._]").replace(r"\#", r"(\d+)")),
        tuple(module + layer for layer in layers.split()),
    )
    for theirs, module, layers in _ORIGINALS
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the network, and where it stands in a layer of a file.

    Attributes:
        name: its dotted name.
        rows: of the file's weight [out, in], one after the other.
    """

    name: str
    rows: tuple[slice, ...]

    def of(self, array: np.ndarray) -> np.ndarray:
        """The layer's rows of an array [out, ...] of the file's layer."""
        return np.concatenate([array[part] for part in self.rows])


class Layers:
    """The linear layers of a network by all the names that they have in files."""

    def __init__(self, widths: Mapping[str, tuple[int, int]]):
        """`widths`: name -> (in, out)."""
        self._widths = widths
        self._flat = {name.replace(".", "_"): name for name in widths}

    def find(self, module: str) -> tuple[Layer, ...]:
        """The layers that a file's module is, top rows first; empty if the network has none.

        Args:
            module: from `parse`.
        """
        if (same := self._flat.get(module.replace(".", "_"))) is not None:
            return (Layer(same, (slice(0, self._widths[same][1]),)),)
        for pattern, names in _PATTERNS:
            if (match := pattern.fullmatch(module)) is not None:
                ours = [name.replace("#", match[1]) if "#" in name else name for name in names]
                return self._stacked(module, ours)
        return ()

    def _stacked(self, module: str, names: list[str]) -> tuple[Layer, ...]:
        if not all(name in self._widths for name in names):
            return ()
        fan_in, fan_out = self._widths[names[0]]
        if "adaLN_modulation" in module and fan_out == 2 * fan_in:
            # Shift and scale of the last norm: the models' own code has the shift first.
            return (Layer(names[0], (slice(fan_in, fan_out), slice(0, fan_in))),)
        layers, start = [], 0
        for name in names:
            stop = start + self._widths[name][1]
            layers.append(Layer(name, (slice(start, stop),)))
            start = stop
        return tuple(layers)


def parse(name: str) -> tuple[str, str] | None:
    """The module that a tensor adapts, without prefixes, and which part of the adapter it is.

    None if it is of another kind.
    """
    name = _PREFIXES.sub("", name.replace(COMPILED, ""), count=1)
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    for part, pattern in _PARTS.items():
        if (match := pattern.fullmatch(name)) is not None:
            return match[1], part
    return None


def is_of_text_encoder(name: str) -> bool:
    """Whether a tensor adapts a text encoder."""
    return _TEXT_ENCODER.match(name) is not None


def other_kind(name: str) -> str | None:
    """What kind of adapter a tensor is of that `parse` does not know, if that can be told."""
    for suffix, kind in _OTHER_KINDS.items():
        if re.fullmatch(rf"(.*\.)?{suffix}", name):
            return kind
    return None


def is_a_change(name: str) -> bool:
    """Whether a tensor is added to one of the network's: zeros then change nothing."""
    return re.fullmatch(r".*\.diff(_b)?", name) is not None
