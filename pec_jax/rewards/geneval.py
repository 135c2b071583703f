"""Whether an image shows the objects that its prompt asks for: GenEval as a reward.

A detector, in this process or on a server, finds the objects of an image; `host.geneval` compares
them with the prompt's metadata, which the prompt file (.jsonl) must hold in the form of GenEval's
evaluation_metadata.jsonl. Colours come from the server, or from a CLIP in this process. That CLIP
runs on torch, because JAX must not compute inside a host callback: on CPU it could wait for the
very step that waits for it. `flax_colours` is the same classifier in JAX, for use outside a step.

Ghosh et al. 2023, arXiv 2310.11513; as a reward: Liu et al. 2025, arXiv 2505.05470.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pec_jax.config import ConfigError
from pec_jax.data.prompts import Prompt
from pec_jax.host import client, colours, detector, geneval
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.networks import Networks
from pec_jax.rewards.base import Reward, field, register
from pec_jax.rewards.clip import tokenize
from pec_jax.rewards.host import encode_prompts, host_reward
from pec_jax.rewards.remote import ServerOptions
from pec_jax.types import PyTree

# ViT-L/14 by OpenAI, as in GenEval; and Meta's own Mask2Former in place of mmdet's.
CLIP = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance@main"
EXAMPLE = Prompt(
    "a photo of a cow right of a laptop",
    {
        "tag": "position",
        "include": [
            {"class": "laptop", "count": 1},
            {"class": "cow", "count": 1, "position": ["right of", 0]},
        ],
    },
)


@dataclasses.dataclass(frozen=True)
class GenEvalOptions(ServerOptions):
    """Of `geneval`; the server is a detector, see host/detector.py."""

    detector: str = field(
        "What detects objects: 'http' is the server at url, 'in_process' needs torch.",
        "http",
        choices=("http", "in_process"),
    )
    model: str = field(
        "The detector in this process: a Mask2Former for COCO's instances, as a directory or hub "
        "id@revision.",
        MASK2FORMER,
    )
    clip: str = field(
        "CLIP that names colours in this process, on torch: a directory or hub id@revision; '' is "
        "OpenAI's ViT-L/14 beside a detector in this process, and else the server's colours.",
        "",
    )
    device: str = field("Of torch, for what runs in this process, such as cpu or cuda:0.", "cpu")
    score: str = field(
        "The rule: 'original' and 'strict' are 0 or 1; 'flow_grpo' and 'fixed' give partial "
        "credit, see host/geneval.py.",
        "fixed",
        choices=tuple(geneval.RULES),
    )


@dataclasses.dataclass(frozen=True)
class Models:
    """What looks at images: a detector, and what names colours where the detector does not."""

    detect: detector.Detector
    classify: colours.Classifier | None = None


@register("geneval", GenEvalOptions)
def make(options: GenEvalOptions, networks: Networks) -> Reward:
    """The score of `geneval.RULES`; NaN where detection or colours failed."""
    models = _once(lambda: load_models(options, networks))

    def judge(images: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
        return scores(models(), options.score, images, prompts)

    def prepare(variables: PyTree, prompts: Sequence[Prompt]) -> np.ndarray:
        check_prompts(prompts)
        models()  # so that what is missing is missed now, not in the first step
        return encode_prompts(prompts)

    return dataclasses.replace(
        host_reward("geneval", judge),
        prepare=prepare,
        input_shapes=lambda n: encode_prompts([EXAMPLE] * n),
    )


def _once(load: Callable[[], Models]) -> Callable[[], Models]:
    """`load`, called by whichever thread comes first, and only then."""
    lock, load_once = threading.Lock(), functools.cache(load)

    def loaded() -> Models:
        with lock:
            return load_once()

    return loaded


def load_models(options: GenEvalOptions, networks: Networks) -> Models:
    """Loads what runs in this process, and sees to it that a server answers.

    Args:
        options: of the reward.
        networks: only to find directories; torch keeps its own weights.

    Raises:
        ConfigError: the server cannot be used, or as `detector.load_torch_model`.
        FileError, WeightsError: as `detector.load_torch_model` and `networks.locate`.
    """
    if options.detector == "http":
        detect, clip = _server_detector(options), options.clip
    else:
        detect = detector.in_process(networks.locate(options.model), options.device)
        clip = options.clip or CLIP
    if not clip:
        return Models(detect)
    return Models(detect, colours.torch_classifier(networks.locate(clip), options.device))


def _server_detector(options: GenEvalOptions) -> detector.Detector:
    if not options.url:
        raise ConfigError(
            "config.rewards.geneval.url is not set: give the address of a server that detects "
            "objects, or set config.rewards.geneval.detector to 'in_process'."
        )
    names = ("url", "timeout", "tries", "concurrency", "key_variable")
    shared = {name: getattr(options, name) for name in names}
    server = client.Options(**shared, max_bytes=detector.MAX_ANSWER)
    (found,) = detector.ask(server, np.zeros((1, 64, 64, 3), np.uint8))
    if isinstance(found, client.Failure):
        raise ConfigError(
            f"The server of config.rewards.geneval at {options.url} cannot be used: "
            f"{found.reason}. Start it, or correct the section's fields."
        )
    return detector.over_http(server)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError for the first prompt whose metadata cannot be used."""
    for prompt in prompts:
        try:
            geneval.parse(prompt.metadata)
        except ValueError as error:
            raise ConfigError(
                f"config.rewards.geneval needs GenEval's metadata with every prompt, and those of "
                f"{prompt.text[:200]!r} cannot be used: {error}"
            ) from error


def scores(models: Models, rule: str, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """How well N images show what their prompts ask for.

    Args:
        models: which look at them.
        rule: one of `geneval.RULES`.
        images: [N, H, W, 3] uint8.
        prompts: N, with GenEval's metadata.

    Returns:
        [N] fp32; NaN where the detector failed, or a colour is asked for and nobody named it.
    """
    judged = [
        math.nan if found is None else _score(models.classify, rule, image, found, prompt)
        for image, found, prompt in zip(images, models.detect(images), prompts, strict=True)
    ]
    return np.array(judged, np.float32)


def _score(
    classify: colours.Classifier | None,
    rule: str,
    image: np.ndarray,
    detections: Sequence[geneval.Detection],
    prompt: Prompt,
) -> float:
    task = geneval.parse(prompt.metadata)
    found: geneval.Found = geneval.keep(detections, task.tag)
    if classify is not None:
        found = colours.name_colours(image, task, found, classify)
    if any(found[label][i].colour is None for label, i in geneval.need_colour(task, found)):
        logging.warning(
            "GenEval's detector names no colours, which %r needs; set config.rewards.geneval.clip.",
            prompt.text[:200],
        )
        return math.nan
    return float(geneval.RULES[rule](task, found))


def flax_colours(encoder: Encoder, variables: PyTree, side: int = 224) -> colours.Classifier:
    """Names colours with a CLIP in JAX; not to be called while a step waits for its host.

    Args:
        encoder: of two towers, such as `Networks.encoder("clip", model)`.
        variables: of the encoder.
        side: of the images that it sees, pixels.
    """
    assert encoder.text_features is not None
    encode_image, encode_text = jax.jit(encoder.image_features), jax.jit(encoder.text_features)

    def image_features(crops: Sequence[np.ndarray]) -> np.ndarray:
        squares = (jnp.asarray(colours.square(c, side)[None] / np.float32(255)) for c in crops)
        return np.concatenate([np.asarray(encode_image(variables, s)) for s in squares])

    def text_features(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(encode_text(variables, tokenize(encoder, texts)))

    return colours.zero_shot(image_features, text_features)
