"""The vision transformers that we know, by the `model_type` of their config.json.

A kind is data: what transformers fills in where a file leaves an entry out, how the files name
their tensors, and what else of the entries matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pec_jax.models import hf_config
from pec_jax.models.encoder import LayerConfig, LayerNames
from pec_jax.models.vision import ROTARY, SMOOTHED, VisionConfig, VisionNames

Values = Mapping[str, Any]  # a config.json, its gaps filled
MAX_GRID = 256  # patches a side; more than attention can take

COMMON: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One model_type.

    Attributes:
        defaults: entries that its files may leave out, beside `COMMON`.
        layer: names of a layer's tensors.
        names: of the others.
        layer_switches: fields of `LayerConfig` that its entries decide.
        switches: fields of `VisionConfig` likewise.
        ignored: regular expressions of tensors in its files that give no features.
        fixed_size: whether its images are of the size that its positions were learned on.
    """

    defaults: Values
    layer: LayerNames
    names: VisionNames
    layer_switches: Callable[[Values], dict[str, Any]] = lambda values: {}
    switches: Callable[[Values], dict[str, Any]] = lambda values: {}
    ignored: tuple[str, ...] = ()
    fixed_size: bool = True


def read_vision_config(values: Values, kind: str = "") -> VisionConfig:
    """A vision transformer from its config.json.

    Args:
        values: the dictionary.
        kind: its model_type; "" is what the file says.

    Raises:
        ValueError: a kind that we do not know, or an entry that we cannot compute; the message
            names it and its value.
    """
    kind = kind or str(values.get("model_type"))
    hf_config.check_choice("model_type", kind, sorted(KINDS))
    known = KINDS[kind]
    values = _checked(values, {**COMMON, **known.defaults})
    width, heads = values["hidden_size"], values["num_attention_heads"]
    hf_config.check_activation("hidden_act", values["hidden_act"])
    hf_config.check_heads(width, heads)
    head_dim = values.get("head_dim", width // heads)
    hf_config.check_choice("head_dim", head_dim, (width // heads,))
    layer = {
        "width": width,
        "heads": heads,
        "mlp_width": values["intermediate_size"],
        "activation": values["hidden_act"],
        "epsilon": values["layer_norm_eps"],
        "names": known.layer,
    }
    return VisionConfig(
        layer=LayerConfig(**layer | known.layer_switches(values)),
        depth=values["num_hidden_layers"],
        names=known.names,
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        num_channels=values["num_channels"],
        **known.switches(values),
    )


def _checked(values: Values, defaults: Values) -> Values:
    """The entries with what they leave out, each of the type of its default and in its range."""
    filled = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    for key in ("image_size", "patch_size"):
        filled[key] = hf_config.square(key, filled[key])
    for key, default in defaults.items():
        hf_config.check_value(key, filled[key], type(default).__name__)
    size, patch = filled["image_size"], filled["patch_size"]
    if not 1 <= size // patch <= MAX_GRID:
        raise ValueError(
            f"image_size = {size} is not supported: with patch_size = {patch} it makes "
            f"{size // patch} patches a side, which must be 1 to {MAX_GRID}"
        )
    return filled


def _qkv_bias(values: Values) -> dict[str, Any]:
    return {"biases": (values["qkv_bias"],) * 3}


def _dinov2_layer(values: Values) -> dict[str, Any]:
    """The width of the MLP is a multiple of the model's; of a gated one two thirds of it,
    rounded up to a multiple of 8.
    """
    width, names = int(values["hidden_size"] * values["mlp_ratio"]), DINOV2_LAYER
    gated = values["use_swiglu_ffn"]
    if gated:
        width = (int(width * 2 / 3) + 7) // 8 * 8
        names = dataclasses.replace(names, up=("mlp.weights_in",), down="mlp.weights_out")
    act = {"activation": "silu"} if gated else {}
    return _qkv_bias(values) | act | {"mlp_width": width, "gated": gated, "names": names}


def _dinov3_layer(values: Values) -> dict[str, Any]:
    names, gated = DINOV3_LAYER, values["use_gated_mlp"]
    if gated:
        names = dataclasses.replace(names, up=("mlp.gate_proj", "mlp.up_proj"))
    return {
        "biases": (values["query_bias"], values["key_bias"], values["value_bias"]),
        "output_bias": values["proj_bias"],
        "mlp_bias": values["mlp_bias"],
        "gated": gated,
        "names": names,
    }


def _dinov3(values: Values) -> dict[str, Any]:
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    if head_dim % 4:
        raise ValueError(
            f"attention heads of {head_dim} are not supported with rotary positions "
            "of two axes: their width must be a multiple of 4"
        )
    return {
        "num_registers": values["num_register_tokens"],
        "positions": ROTARY,
        "rope_theta": values["rope_theta"],
    }


def _siglip(values: Values) -> dict[str, Any]:
    hf_config.check_choice("vision_use_head", values["vision_use_head"], (True,))
    return {"pooling": "attention"}


CLIP_LAYER = LayerNames(
    norms=("layer_norm1", "layer_norm2"),
    projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.out_proj",
    up=("mlp.fc1",),
    down="mlp.fc2",
)
VIT_LAYER = LayerNames(
    norms=("layernorm_before", "layernorm_after"),
    projections=tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    output="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
)
DINOV2_LAYER = dataclasses.replace(
    VIT_LAYER,
    norms=("norm1", "norm2"),
    up=("mlp.fc1",),
    down="mlp.fc2",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
DINOV3_LAYER = dataclasses.replace(
    DINOV2_LAYER,
    projections=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    output="attention.o_proj",
    up=("mlp.up_proj",),
    down="mlp.down_proj",
)
BLIP_LAYER = dataclasses.replace(
    CLIP_LAYER, projections=("self_attn.qkv",), output="self_attn.projection"
)
CLIP_NAMES = VisionNames(
    patches="embeddings.patch_embedding",
    class_token="embeddings.class_embedding",
    registers="",
    positions="embeddings.position_embedding",
    layers="encoder.layers",
    last_norm="post_layernorm",
    first_norm="pre_layrnorm",
    modules=True,
)
VIT_NAMES = VisionNames(
    patches="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    registers="embeddings.register_tokens",
    positions="embeddings.position_embeddings",
    layers="encoder.layer",
    last_norm="layernorm",
)
_DINOV2 = Kind(
    {
        "layer_norm_eps": 1e-6,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "num_register_tokens": 4,
    },
    DINOV2_LAYER,
    VIT_NAMES,
    _dinov2_layer,
    ignored=(r"embeddings\.mask_token",),  # stands for hidden patches in pre-training
    fixed_size=False,
)

KINDS: dict[str, Kind] = {
    "clip_vision_model": Kind(
        {
            "layer_norm_eps": 1e-5,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
        },
        CLIP_LAYER,
        CLIP_NAMES,
        switches=lambda values: {"patch_bias": False},
        ignored=(r"embeddings\.position_ids",),
    ),
    "vit": Kind(
        {"layer_norm_eps": 1e-12, "qkv_bias": True},
        VIT_LAYER,
        VIT_NAMES,
        _qkv_bias,
        # A head that DINO was not trained with: transformers adds it with random values.
        ignored=(r"pooler\..*",),
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": dataclasses.replace(
        _DINOV2,
        switches=lambda values: {
            "num_registers": values["num_register_tokens"],
            "positions": SMOOTHED,
        },
    ),
    "dinov3_vit": Kind(
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_attention_heads": 6,
            "layer_norm_eps": 1e-5,
            "rope_theta": 100.0,
            "query_bias": True,
            "key_bias": False,
            "value_bias": True,
            "proj_bias": True,
            "mlp_bias": True,
            "use_gated_mlp": False,
            "num_register_tokens": 0,
        },
        DINOV3_LAYER,
        VisionNames(
            patches="embeddings.patch_embeddings",
            class_token="embeddings.cls_token",
            registers="embeddings.register_tokens",
            positions="",
            layers="layer",
            last_norm="norm",
        ),
        _dinov3_layer,
        _dinov3,
        ignored=(r"embeddings\.mask_token",),
        fixed_size=False,
    ),
    "siglip_vision_model": Kind(
        {
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": True,
        },
        CLIP_LAYER,
        dataclasses.replace(CLIP_NAMES, class_token="", first_norm=""),
        switches=_siglip,
        ignored=(r"embeddings\.position_ids",),
    ),
    "blip_vision_model": Kind(
        {"layer_norm_eps": 1e-5, "image_size": 384},
        BLIP_LAYER,
        dataclasses.replace(CLIP_NAMES, first_norm="", modules=False),
    ),
}
