"""Encoders from the files of their publishers: CLIP and its like, vision transformers, BLIP.

A model is a Hugging Face directory, an open_clip one, or a single file of weights whose
architecture is known by name (`published`). Features are given as the model gives them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.families.tokenizers import VOCABULARIES, load_tokenizer
from pec_jax.io import read_json
from pec_jax.models import blip, clip, hf_config, vision, vision_kinds
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.open_clip import from_open_clip
from pec_jax.perception.preprocessing import PIL, Preprocessor
from pec_jax.types import PyTree
from pec_jax.weights.convert import boxed_variables, from_torch, placed_shapes
from pec_jax.weights.layouts import LAYOUTS
from pec_jax.weights.model_files import open_model
from pec_jax.weights.published import Files
from pec_jax.weights.tensors import WeightsError

Array = jax.Array
T = TypeVar("T")
Loaded = tuple[Encoder, PyTree]  # an encoder and its variables

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
_TEXT = ("text_model", "text_projection")  # what only texts go through
BLIP_LENGTH = 35  # tokens of a text, of ImageReward


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an encoder comes from, and where it goes.

    Attributes:
        path: a directory, or a file of weights.
        key: of its variables, see `Networks`; the path by default.
        dtype: in which the network is kept and computes.
        sharding: where its parameters go, a sharding for all or a `Placement`; None is the default
            device.
        weights: False reads config files alone: parameters are shapes.
        architecture: config files of a model whose path lacks them; its preprocessing is
            the one that counts.
        tokenizers: directories to look for a tokenizer in, after the model's own.
        rounding: how images are resized, see `preprocessing`.
    """

    path: Path
    key: str = ""
    dtype: Any = jnp.float32
    sharding: Any = None
    weights: bool = True
    architecture: Files | None = None
    tokenizers: tuple[Path, ...] = ()
    rounding: str = PIL

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name

    def settings(self, read: Callable[[Mapping[str, Any]], T], values: Mapping[str, Any]) -> T:
        """What `read` makes of the config's entries.

        Raises:
            WeightsError: an entry that we cannot compute; the message names the file.
        """
        with _named(self.file(CONFIG)):
            return read(values)

    def file(self, name: str) -> Path:
        """Where the entries of one of transformers' config files come from, for messages."""
        files = [self.path / name, self.path / OPEN_CLIP_CONFIG]
        return next((file for file in files if file.is_file()), self.path)

    def variables(self, model: Any, kind: str, *example: Any, ignore: Sequence[str]) -> PyTree:
        """A network's variables, or their shapes."""
        boxes = boxed_variables(model, *example)
        if not self.weights:
            return placed_shapes(boxes, dtype=self.dtype, sharding=self.sharding)
        tensors = open_model(self.path)
        if kind in LAYOUTS:
            tensors = LAYOUTS[kind](tensors)
        where = self.sharding
        if where is None:
            where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return from_torch(tensors, boxes, ignore=ignore, dtype=self.dtype, sharding=where)

    def tokenizer(self) -> Any:
        """The first tokenizer there is.

        Raises:
            WeightsError: there is none.
        """
        places = [self.path, *self.tokenizers]
        for place in places:
            if any((place / file).is_file() for file in VOCABULARIES):
                return load_tokenizer(place)
        looked = ", ".join(str(place) for place in places)
        raise WeightsError(
            f"{self.path}: its tokenizer is in none of {looked}; give its directory or hub id as "
            "the option `tokenizer`"
        )


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Puts the file's path before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise WeightsError(f"{file}: {error}") from error


def load_encoder(source: Source | str | Path, **options: Any) -> Loaded:
    """Loads an encoder.

    Args:
        source: what to load, and where to; a path is a `Source` of that path.
        **options: of the `Source` of a path.

    Returns:
        The encoder and its variables.

    Raises:
        WeightsError: a file or tensor is missing, left over or misshapen; a kind of model, or an
            entry of its config files, that we cannot compute.
    """
    if not isinstance(source, Source):
        source = Source(Path(source), **options)
    if not source.key:
        source = dataclasses.replace(source, key=str(source.path))
    config, preprocessor = config_files(source)
    kind = config.get("model_type")
    with _named(source.file(CONFIG)):
        hf_config.check_choice("model_type", kind, list(LOADERS))
    with _named(source.file(PREPROCESSOR)):
        preprocess = Preprocessor.from_dict(preprocessor, str(kind), source.rounding)
    return LOADERS[str(kind)](source, config, preprocess)


def config_files(source: Source) -> tuple[dict, dict]:
    """The contents of config.json and preprocessor_config.json.

    Raises:
        WeightsError: the path has none, and no architecture stands in for them.
    """
    root, known = source.path, source.architecture or {}
    if (root / CONFIG).is_file():
        config = read_json(root / CONFIG)
        file = root / PREPROCESSOR
        return config, dict(known[PREPROCESSOR]) if PREPROCESSOR in known else read_json(file)
    if (root / OPEN_CLIP_CONFIG).is_file():
        values = read_json(root / OPEN_CLIP_CONFIG)
        with _named(root / OPEN_CLIP_CONFIG):
            return from_open_clip(values)
    if known:
        return dict(known[CONFIG]), dict(known[PREPROCESSOR])
    raise WeightsError(f"{root}: holds no {CONFIG}; give the directory of a whole model")


def _check_size(source: Source, preprocess: Preprocessor, image_size: int) -> None:
    """Finds out at once, not in the middle of a run, that two files do not fit each other."""
    size = preprocess.output_size(image_size, image_size)
    if size != (image_size, image_size):
        raise WeightsError(
            f"{source.path}: {PREPROCESSOR} makes images of {size}, "
            f"but {CONFIG} has image_size = {image_size}"
        )


def _pixels(config: vision.VisionConfig) -> Any:
    shape = (1, config.image_size, config.image_size, config.num_channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _load_clip(source: Source, config: dict, preprocess: Preprocessor) -> Loaded:
    settings = source.settings(clip.CLIPConfig.from_dict, config)
    model = clip.CLIPModel(settings, dtype=source.dtype)
    _check_size(source, preprocess, settings.vision.image_size)
    ids = np.zeros((1, 2), np.int32)
    variables = source.variables(
        model, "clip", ids, _pixels(settings.vision), ignore=clip.IGNORED_TENSORS
    )

    def image_features(params: PyTree, images: Array) -> Array:
        features: Any = model.apply(params, preprocess(images), method="get_image_features")
        return features.astype(jnp.float32)

    def text_features(params: PyTree, token_ids: Array) -> Array:
        features: Any = model.apply(params, token_ids, method="get_text_features")
        return features.astype(jnp.float32)

    def logit_scale(params: PyTree) -> Array:
        return jnp.exp(params["params"]["logit_scale"].astype(jnp.float32))

    encoder = Encoder(
        name=source.name,
        network=source.key,
        dim=settings.projection_dim,
        image_features=image_features,
        text_features=text_features,
        logit_scale=logit_scale,
        tokenizer=functools.cache(source.tokenizer),
        text_length=settings.text.max_position_embeddings,
        text_modules=_TEXT,
    )
    return encoder, variables


def _load_vision(source: Source, config: dict, preprocess: Preprocessor) -> Loaded:
    """A vision transformer by itself, or the one of a model whose texts we do not read."""
    kind = config["model_type"]
    tower = "siglip_vision_model" if kind == "siglip" else kind

    def read(values: Mapping[str, Any]) -> vision.VisionConfig:
        entries = hf_config.section(values, "vision_config") if kind == "siglip" else values
        return vision_kinds.read_vision_config(entries, tower)

    settings = source.settings(read, config)
    known = vision_kinds.KINDS[tower]
    if known.fixed_size:
        _check_size(source, preprocess, settings.image_size)
    model = vision.VisionTower(settings, dtype=source.dtype)
    ignored = (*known.ignored, *(_SIGLIP_TEXT if kind == "siglip" else ()))
    variables = source.variables(model, kind, _pixels(settings), ignore=ignored)

    def image_features(params: PyTree, images: Array) -> Array:
        features: Any = model.apply(params, preprocess(images))
        return features.astype(jnp.float32)

    return Encoder(source.name, source.key, settings.width, image_features), variables


_SIGLIP_TEXT = (r"text_model\..*", "logit_scale", "logit_bias")


def _load_blip(source: Source, config: dict, preprocess: Preprocessor) -> Loaded:
    settings = source.settings(blip.BlipConfig.from_dict, config)
    _check_size(source, preprocess, settings.vision.image_size)
    model = blip.BlipModel(settings, dtype=source.dtype)
    ids = np.zeros((1, 2), np.int32)
    ignored = (*blip.IGNORED_TENSORS, r"mlp\..*")  # ImageReward's head, see `heads`
    variables = source.variables(model, "blip", ids, ids, _pixels(settings.vision), ignore=ignored)

    def image_features(params: PyTree, images: Array) -> Array:
        features: Any = model.apply(params, preprocess(images), method="get_image_features")
        return features.astype(jnp.float32)

    def pair_features(params: PyTree, tokens: tuple[Array, Array], images: Array) -> Array:
        features: Any = model.apply(params, *tokens, preprocess(images))
        return features.astype(jnp.float32)

    encoder = Encoder(
        name=source.name,
        network=source.key,
        dim=settings.vision.width,
        image_features=image_features,
        pair_features=pair_features,
        pair_dim=settings.text.hidden_size,
        tokenizer=functools.cache(source.tokenizer),
        text_length=BLIP_LENGTH,
    )
    return encoder, variables


LOADERS: dict[str, Callable[..., Loaded]] = {
    "clip": _load_clip,
    "blip": _load_blip,
    **dict.fromkeys(
        (
            "vit",
            "dinov2",
            "dinov2_with_registers",
            "dinov3_vit",
            "siglip",
            "siglip_vision_model",
        ),
        _load_vision,
    ),
}
