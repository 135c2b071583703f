"""Other names for the same tensors: how a published file becomes the one that a network expects.

A layout is a function from a state dict to the same tensors under Hugging Face's names; nothing is
read before it is asked for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from pec_jax.weights.tensors import Tensors, WeightsError

COMPILED = "_orig_mod."  # what torch.compile puts before the names inside of a module
WRAPPERS = ("module.", COMPILED, "model.")  # of DataParallel, torch.compile, and mixins
Layout = Callable[[Tensors], Tensors]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor is found.

    Attributes:
        name: in the file.
        parts: of the file's tensor, cut along its first axis, those that make it up, in this order.
        of: the number of equal parts that it is cut into.
        transposed: whether the file holds the transpose.
    """

    name: str
    parts: tuple[int, ...] = (0,)
    of: int = 1
    transposed: bool = False


class Renamed(Tensors):
    """The tensors of another mapping under other names."""

    def __init__(self, source: Tensors, places: Mapping[str, Place]):
        """`places`: our name -> where it is in `source`."""
        self.directory = source.directory
        self._source, self._places = source, dict(places)

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        array = self._source[place.name]
        if place.of > 1:
            cut = np.split(array, place.of)
            array = np.concatenate([cut[i] for i in place.parts])
        return array.T if place.transposed else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it.

        Raises:
            WeightsError: the file's does not divide into parts.
        """
        place = self._places[name]
        shape = self._source.shape(place.name)
        if place.of > 1:
            if not shape or shape[0] % place.of:
                raise WeightsError(
                    f"{self.file(name)}: tensor {place.name!r} has shape {list(shape)}, which does "
                    f"not divide into {place.of} parts"
                )
            shape = (shape[0] // place.of * len(place.parts), *shape[1:])
        return shape[::-1] if place.transposed else shape

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._source.file(self._places[name].name)


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    """Every tensor under the name that `rename` gives it."""
    return Renamed(tensors, {rename(name): Place(name) for name in tensors})


def uncompiled(tensors: Tensors) -> Tensors:
    """As before torch.compile, of the whole model or of modules in it."""
    if not any(COMPILED in name for name in tensors):
        return tensors
    return renamed(tensors, lambda name: name.replace(COMPILED, ""))


def unwrapped(tensors: Tensors) -> Tensors:
    """Without a prefix that a wrapper of the model gave to all names."""
    for prefix in WRAPPERS:
        if len(tensors) and all(name.startswith(prefix) for name in tensors):
            bare = {name.removeprefix(prefix): Place(name) for name in tensors}
            return unwrapped(Renamed(tensors, bare))
    return tensors


_OPEN_CLIP = (  # pattern of open_clip's name, transformers' name
    (r"logit_scale", "logit_scale"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(.*)", r"text_model.final_layer_norm.\1"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.(.*)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(.*)", r"vision_model.post_layernorm.\1"),
)
_OPEN_CLIP_LAYER = (
    (r"attn\.out_proj\.(.*)", r"self_attn.out_proj.\1"),
    (r"ln_([12])\.(.*)", r"layer_norm\1.\2"),
    (r"mlp\.c_fc\.(.*)", r"mlp.fc1.\1"),
    (r"mlp\.c_proj\.(.*)", r"mlp.fc2.\1"),
)
_PROJECTIONS = {"text_projection": "text_projection", "visual.proj": "visual_projection"}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.*)")
_JOINED = re.compile(r"attn\.in_proj_(weight|bias)")


def clip(tensors: Tensors) -> Tensors:
    """A `CLIPModel`, from transformers' own names or from open_clip's.

    Source: open_clip (mlfoundations/open_clip@89fb801: src/open_clip/transformer.py).
    """
    tensors = unwrapped(tensors)
    if "visual.conv1.weight" not in tensors:
        return tensors
    places: dict[str, Place] = {}
    for name in tensors:
        places |= _from_open_clip(name)
    return Renamed(tensors, places)


def _from_open_clip(name: str) -> dict[str, Place]:
    if name in _PROJECTIONS:
        return {f"{_PROJECTIONS[name]}.weight": Place(name, transposed=True)}
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return {_translated(name, _OPEN_CLIP): Place(name)}
    tower = "vision_model" if layer[1] else "text_model"
    prefix = f"{tower}.encoder.layers.{layer[2]}"
    joined = _JOINED.fullmatch(layer[3])
    if joined is None:
        return {f"{prefix}.{_translated(layer[3], _OPEN_CLIP_LAYER)}": Place(name)}
    return {
        f"{prefix}.self_attn.{part}_proj.{joined[1]}": Place(name, (i,), 3)
        for i, part in enumerate("qkv")
    }


def _translated(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """The name by the first pattern that matches all of it; unchanged where none does."""
    for pattern, replacement in table:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def siglip_vision(tensors: Tensors) -> Tensors:
    """A `SiglipVisionModel`, alone or out of a whole SigLIP."""
    tensors = unwrapped(tensors)
    prefix = "vision_model."
    inside = [name for name in tensors if name.startswith(prefix)]
    if not inside:
        return tensors
    return Renamed(tensors, {name.removeprefix(prefix): Place(name) for name in inside})


def dinov3(tensors: Tensors) -> Tensors:
    """A `DINOv3ViTModel`; transformers 5 writes `model.layer.N` where the hub has `layer.N`."""
    return renamed(unwrapped(tensors), lambda name: name.removeprefix("model."))


_IMAGE_REWARD = (
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(.*)", r"vision_model.embeddings.patch_embedding.\1"),
    (
        r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(.*)",
        r"vision_model.encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.*)",
        r"vision_model.encoder.layers.\1.self_attn.qkv.\2",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.*)",
        r"vision_model.encoder.layers.\1.self_attn.projection.\2",
    ),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(.*)", r"vision_model.encoder.layers.\1.mlp.\2"),
    (r"visual_encoder\.norm\.(.*)", r"vision_model.post_layernorm.\1"),
)


def blip(tensors: Tensors) -> Tensors:
    """BLIP by transformers' names, from those or from ImageReward's; its head keeps `mlp.`.

    Source: ImageReward (THUDM/ImageReward@c1392c6: ImageReward/ImageReward.py).
    """
    tensors = unwrapped(tensors)
    return renamed(tensors, lambda name: _translated(name.removeprefix("blip."), _IMAGE_REWARD))


LAYOUTS: dict[str, Layout] = {  # by model_type; others are as they are
    "clip": clip,
    "siglip": siglip_vision,
    "siglip_vision_model": siglip_vision,
    "dinov3_vit": dinov3,
    "blip": blip,
}
