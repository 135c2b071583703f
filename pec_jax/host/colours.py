"""Colours of detected objects by zero-shot classification with CLIP, as in GenEval.

An object is cut out by its box, everything outside its mask painted grey, and compared with each of
the ten colours. The vector of a colour is the normalised mean of the unit text features of three
sentences; the colour with the largest cosine wins.

Source: `djghosh13/geneval@af4902f:evaluation/evaluate_images.py`, with open_clip's ViT-L/14 and its
preprocessing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pec_jax.host.geneval import CLASSES, COLOURS, Detection, Found, Task, need_colour

TEMPLATES = (
    "a photo of a {c} {name}",
    "a photo of a {c}-colored {name}",
    "a photo of a {c} object",
)
GREY = 0x99
# Of CLIP's pixels in [0, 1].
MEAN = np.asarray((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.asarray((0.26862954, 0.26130258, 0.27577711), np.float32)

# (N crops [h, w, 3] uint8 of any sizes, N class names) -> N of `COLOURS`
Classifier = Callable[[Sequence[np.ndarray], Sequence[str]], list[str]]
# N crops, or N texts, -> features [N, D]
ImageFeatures = Callable[[Sequence[np.ndarray]], np.ndarray]
TextFeatures = Callable[[Sequence[str]], np.ndarray]


def crop(image: np.ndarray, detection: Detection) -> np.ndarray:
    """Cuts one object out.

    Args:
        image: [H, W, 3] uint8.
        detection: its box is rounded to whole pixels, at least one in each direction.

    Returns:
        [h, w, 3] uint8, grey outside the object's mask where there is one.
    """
    if detection.mask is not None:
        image = np.where(detection.mask[..., None], image, np.uint8(GREY))
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (round(value) for value in detection.box)
    left, top = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[top : max(y1, top + 1), left : max(x1, left + 1)]


def square(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes the shorter side (bicubic) and cuts out the centre, as open_clip does.

    Args:
        image: [h, w, 3] uint8.
        side: wanted, pixels.

    Returns:
        [side, side, 3] uint8.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(side * width / short), int(side * height / short))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = (round((n - side) / 2) for n in size)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def zero_shot(image_features: ImageFeatures, text_features: TextFeatures) -> Classifier:
    """A classifier from the two towers of a CLIP; texts of a class are encoded once.

    Args:
        image_features: crops -> [N, D], not normalised.
        text_features: texts -> [N, D], not normalised.
    """
    vectors: dict[str, np.ndarray] = {}  # class name -> [10, D]

    def of_class(name: str) -> np.ndarray:
        if name not in vectors:
            texts = [template.format(c=c, name=name) for c in COLOURS for template in TEMPLATES]
            features = _unit(text_features(texts)).reshape(len(COLOURS), len(TEMPLATES), -1)
            vectors[name] = _unit(features.mean(axis=1))
        return vectors[name]

    def classify(crops: Sequence[np.ndarray], class_names: Sequence[str]) -> list[str]:
        features = image_features(crops)
        best = [int(np.argmax(of_class(name) @ f)) for f, name in zip(features, class_names)]
        return [COLOURS[index] for index in best]

    return classify


def torch_classifier(directory: Path, device: str = "cpu") -> Classifier:
    """A classifier that runs in this process on torch, next to JAX.

    Args:
        directory: of a Hugging Face CLIP with its tokenizer.
        device: of torch.

    Raises:
        ConfigError, FileError: as `detector.load_torch_model`.
    """
    from pec_jax.host.detector import load_torch_model

    model = load_torch_model("CLIPModel", directory, device)
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    side = model.config.vision_config.image_size
    length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def image_features(crops: Sequence[np.ndarray]) -> np.ndarray:
        squares = np.stack([square(c, side) for c in crops]).astype(np.float32) / 255
        pixels = torch.from_numpy((squares - MEAN) / STD)
        outputs = model.get_image_features(pixel_values=pixels.permute(0, 3, 1, 2).to(device))
        return outputs.pooler_output.float().cpu().numpy()

    @torch.inference_mode()
    def text_features(texts: Sequence[str]) -> np.ndarray:
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        ids = torch.tensor(tokenizer(list(texts), **options)["input_ids"])
        return model.get_text_features(input_ids=ids.to(device)).pooler_output.float().cpu().numpy()

    return zero_shot(image_features, text_features)


def name_colours(image: np.ndarray, task: Task, found: Found, classify: Classifier) -> Found:
    """Gives colours to the detections whose colour a rule looks at and nobody has named.

    Args:
        image: [H, W, 3] uint8.
        task: of its prompt.
        found: what `geneval.keep` kept.
        classify: which names the colours.
    """
    places = [p for p in need_colour(task, found) if found[p[0]][p[1]].colour is None]
    if not places:
        return found
    crops = [crop(image, found[label][i]) for label, i in places]
    named = classify(crops, [CLASSES[label] for label, _ in places])
    changed: Mapping[int, list[Detection]] = {label: list(d) for label, d in found.items()}
    for (label, i), colour in zip(places, named):
        changed[label][i] = dataclasses.replace(changed[label][i], colour=colour)
    return changed
