"""Perceptual encoders: decoded images to features, in the graph.

An encoder is a Hugging Face directory of a CLIP model (PickScore is one), of a ViT such as DINO,
or of a DINOv2: weights, `preprocessor_config.json` and, for CLIP, a tokenizer. Features are given
as the model gives them; `unit` normalises them where the caller wants that.
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
from pec_jax.perception.preprocessing import Preprocessor, to_uint8_levels
from pec_jax.weights.convert import boxed_variables, placed_shapes

__all__ = ["Encoder", "load_encoder", "to_uint8_levels", "unit"]

Array = jax.Array
PyTree = Any

_TEXT = ("text_model", "text_projection")  # what only texts go through


def unit(features: Array) -> Array:
    """Features over their Euclidean norm, f / ||f||.

    Args:
        features: [..., d].

    Returns:
        [..., d] of norm one; a zero vector stays zero, with a finite gradient.
    """
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen image encoder, perhaps with a text tower in the same space.

    Attributes:
        name: of its directory.
        dim: d, the number of features.
        params: the network's variables; passed to every function, so that they are arguments of
            a compiled step and not constants in it.
        image_features: (params, images [N, H, W, 3] in [0, 1]) -> [N, d] fp32, not normalised.
            Any H and W; resized as `preprocessor_config.json` says.
        text_features: (params, token ids [N, L]) -> [N, d] fp32, not normalised; None for an
            encoder of images only.
        logit_scale: (params) -> the factor of cosine similarities, exp of what is stored; None
            for an encoder of images only.
        tokenizer: a Hugging Face tokenizer, or None.
        text_length: L, tokens of a text; 0 for an encoder of images only.
    """

    name: str
    dim: int
    params: PyTree
    image_features: Callable[[PyTree, Array], Array]
    text_features: Callable[[PyTree, Array], Array] | None = None
    logit_scale: Callable[[PyTree], Array] | None = None
    tokenizer: Any = None
    text_length: int = 0

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids of texts, padded and cut to the encoder's length.

        Args:
            texts: N texts.

        Returns:
            [N, L] int32.

        Raises:
            ValueError: the encoder has no text tower.
        """
        if self.tokenizer is None:
            raise ValueError(f"the encoder {self.name!r} takes images only, it has no text tower")
        encoded = self.tokenizer(
            list(texts), padding="max_length", max_length=self.text_length, truncation=True
        )
        return np.asarray(encoded["input_ids"], np.int32)

    def without_text(self) -> Encoder:
        """The encoder without the weights of its text tower, for when all texts are encoded."""
        kept = {name: tree for name, tree in self.params["params"].items() if name not in _TEXT}
        return dataclasses.replace(self, params={**self.params, "params": kept})


def load_encoder(
    directory: str | Path,
    dtype: jnp.dtype = jnp.float32,
    *,
    sharding: Any = None,
    weights: bool = True,
) -> Encoder:
    """Loads an encoder from a Hugging Face directory.

    Args:
        directory: holds `config.json` (its model_type is one of `LOADERS`),
            `model.safetensors`, `preprocessor_config.json`, and for CLIP the tokenizer's files.
        dtype: in which the network is kept and computes.
        sharding: where its parameters go, a sharding for all or a `Placement`; None is the default
            device.
        weights: False reads config files alone: parameters are shapes, and there is no tokenizer.

    Returns:
        The encoder.

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
    return LOADERS[kind](_Source(root, dtype, sharding, weights), config, preprocess)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where an encoder's weights come from, and where they go."""

    root: Path
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


def _load_clip(source: _Source, config: dict, preprocess: Preprocessor) -> Encoder:
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

    return Encoder(
        name=root.name,
        dim=settings.projection_dim,
        params=variables,
        image_features=image_features,
        text_features=text_features,
        logit_scale=logit_scale,
        tokenizer=tokenizer,
        text_length=text_length,
    )


def _load_vit(source: _Source, config: dict, preprocess: Preprocessor) -> Encoder:
    settings = vit.ViTConfig.from_dict(config)
    _check_size(source.root, preprocess, settings.image_size)
    model = vit.ViTModel(settings, dtype=source.dtype)
    return _images_only(source, model, preprocess, vit.IGNORED_TENSORS)


def _load_dinov2(source: _Source, config: dict, preprocess: Preprocessor) -> Encoder:
    settings = dinov2.Dinov2Config.from_dict(config)
    model = dinov2.Dinov2Model(settings, dtype=source.dtype)
    return _images_only(source, model, preprocess, dinov2.IGNORED_TENSORS)


def _images_only(
    source: _Source,
    model: vit.ViTModel | dinov2.Dinov2Model,
    preprocess: Preprocessor,
    ignore: Sequence[str],
) -> Encoder:
    """An encoder whose features are its class token."""
    c = model.config
    pixels = np.zeros((1, c.image_size, c.image_size, c.num_channels), np.float32)
    variables = source.variables(model, pixels, ignore=ignore)

    def image_features(params: PyTree, images: Array) -> Array:
        hidden: Any = model.apply(params, preprocess(images))
        return hidden[:, 0].astype(jnp.float32)

    return Encoder(
        name=source.root.name, dim=c.hidden_size, params=variables, image_features=image_features
    )


LOADERS: dict[str, Callable[..., Encoder]] = {
    "clip": _load_clip,
    "vit": _load_vit,
    **dict.fromkeys(dinov2.MODEL_TYPES, _load_dinov2),
}
