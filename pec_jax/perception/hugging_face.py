"""Encoders from Hugging Face directories: CLIP (PickScore is one), ViTs such as DINO, DINOv2.

A directory holds weights, `preprocessor_config.json` and, for CLIP, a tokenizer. Features are given
as the model gives them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.families.text import load_tokenizer, load_variables
from pec_jax.io import read_json
from pec_jax.models import clip, dinov2, vit
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.preprocessing import Preprocessor
from pec_jax.types import PyTree
from pec_jax.weights.convert import boxed_variables, placed_shapes

Array = jax.Array
Loaded = tuple[Encoder, PyTree]  # an encoder and its variables

_TEXT = ("text_model", "text_projection")  # what only texts go through


def load_encoder(
    directory: str | Path,
    dtype: jnp.dtype = jnp.float32,
    *,
    key: str = "",
    sharding: Any = None,
    weights: bool = True,
) -> Loaded:
    """Loads an encoder from a Hugging Face directory.

    Args:
        directory: holds `config.json` (its model_type is one of `LOADERS`),
            `model.safetensors`, `preprocessor_config.json`, and for CLIP the tokenizer's files.
        dtype: in which the network is kept and computes.
        key: of its variables, see `Networks`; the directory by default.
        sharding: where its parameters go, a sharding for all or a `Placement`; None is the default
            device.
        weights: False reads config files alone: parameters are shapes, and there is no tokenizer.

    Returns:
        The encoder and its variables.

    Raises:
        WeightsError: a file or tensor is missing, left over or misshapen.
        ValueError: a kind of model, or a config entry, that we cannot compute.
    """
    root = Path(directory)
    config = read_json(root / "config.json")
    kind = config.get("model_type")
    if kind not in LOADERS:
        known = ", ".join(repr(k) for k in LOADERS)
        raise ValueError(f"{root}: model_type = {kind!r} is no encoder we know; known: {known}")
    preprocess = Preprocessor.from_dict(read_json(root / "preprocessor_config.json"), kind)
    source = _Source(root, key or str(root), dtype, sharding, weights)
    return LOADERS[kind](source, config, preprocess)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where an encoder's weights come from, and where they go."""

    root: Path
    key: str
    dtype: jnp.dtype
    sharding: Any
    weights: bool

    def variables(self, model: Any, *example: Any, ignore: Sequence[str]) -> PyTree:
        """A network's variables, or their shapes."""
        if not self.weights:
            boxes = boxed_variables(model, *example)
            return placed_shapes(boxes, dtype=self.dtype, sharding=self.sharding)
        return load_variables(
            self.root, model, *example, ignore=ignore, dtype=self.dtype, sharding=self.sharding
        )


def _check_size(root: Path, preprocess: Preprocessor, image_size: int) -> None:
    """Finds out at once, not in the middle of a run, that two files do not fit each other."""
    size = preprocess.output_size(image_size, image_size)
    if size != (image_size, image_size):
        raise ValueError(
            f"{root}: preprocessor_config.json makes images of {size}, "
            f"but config.json has image_size = {image_size}"
        )


def _load_clip(source: _Source, config: dict, preprocess: Preprocessor) -> Loaded:
    root, settings = source.root, clip.CLIPConfig.from_dict(config)
    model = clip.CLIPModel(settings, dtype=source.dtype)
    side = settings.vision.image_size
    _check_size(root, preprocess, side)
    ids = np.zeros((1, 2), np.int32)
    pixels = np.zeros((1, side, side, settings.vision.num_channels), np.float32)
    variables = source.variables(model, ids, pixels, ignore=clip.IGNORED_TENSORS)
    tokenizer = load_tokenizer(root) if source.weights else None
    text_length = settings.text.max_position_embeddings
    if tokenizer is not None:
        text_length = min(tokenizer.model_max_length, text_length)

    def image_features(params: PyTree, images: Array) -> Array:
        pixels = preprocess(images)
        features: Any = model.apply(params, pixels, method="get_image_features")
        return features.astype(jnp.float32)

    def text_features(params: PyTree, token_ids: Array) -> Array:
        features: Any = model.apply(params, token_ids, method="get_text_features")
        return features.astype(jnp.float32)

    def logit_scale(params: PyTree) -> Array:
        return jnp.exp(params["params"]["logit_scale"].astype(jnp.float32))

    encoder = Encoder(
        name=root.name,
        network=source.key,
        dim=settings.projection_dim,
        image_features=image_features,
        text_features=text_features,
        logit_scale=logit_scale,
        tokenizer=tokenizer,
        text_length=text_length,
        text_modules=_TEXT,
    )
    return encoder, variables


def _load_vit(source: _Source, config: dict, preprocess: Preprocessor) -> Loaded:
    settings = vit.ViTConfig.from_dict(config)
    _check_size(source.root, preprocess, settings.image_size)
    model = vit.ViTModel(settings, dtype=source.dtype)
    return _images_only(source, model, preprocess, vit.IGNORED_TENSORS)


def _load_dinov2(source: _Source, config: dict, preprocess: Preprocessor) -> Loaded:
    settings = dinov2.Dinov2Config.from_dict(config)
    model = dinov2.Dinov2Model(settings, dtype=source.dtype)
    return _images_only(source, model, preprocess, dinov2.IGNORED_TENSORS)


def _images_only(
    source: _Source,
    model: vit.ViTModel | dinov2.Dinov2Model,
    preprocess: Preprocessor,
    ignore: Sequence[str],
) -> Loaded:
    """An encoder whose features are its class token."""
    c = model.config
    pixels = np.zeros((1, c.image_size, c.image_size, c.num_channels), np.float32)
    variables = source.variables(model, pixels, ignore=ignore)

    def image_features(params: PyTree, images: Array) -> Array:
        hidden: Any = model.apply(params, preprocess(images))
        return hidden[:, 0].astype(jnp.float32)

    encoder = Encoder(source.root.name, source.key, c.hidden_size, image_features)
    return encoder, variables


LOADERS: dict[str, Callable[..., Loaded]] = {
    "clip": _load_clip,
    "vit": _load_vit,
    **dict.fromkeys(dinov2.MODEL_TYPES, _load_dinov2),
}
