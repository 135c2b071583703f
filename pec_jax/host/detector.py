"""Object detectors for GenEval: Mask2Former in this process, or a server.

In this process: `Mask2FormerForUniversalSegmentation` of transformers with COCO's 80 classes, whose
outputs are read in mmdet's order. Masks are resized to the image before they are scored and
thresholded, and a score is the class probability times the mean probability of the mask's pixels.
Images enter as RGB, which the weights were trained on. (geneval gives mmdet a file name, which also
ends as RGB; reward-server and DiffusionNFT give it an RGB array, which mmdet takes for BGR, so that
their detector sees red and blue exchanged. We do not follow them in that.)

A server gets POST `{"images": [base64 of a PNG], "threshold": number}` and answers
`{"detections": [[{"label": 0..79, "score": number, "box": [x0, y0, x1, y1], "colour": string or
null, "mask": base64 of a PNG or null}, ...]]}`: one list per image (each request has one image), of
the objects with a score above the threshold; boxes in pixels, colours one of `geneval.COLOURS`,
masks grey and of the image's size with 255 on the object. "colour" and "mask" may be left out.

Source: `open-mmlab/mmdetection: mmdet/models/seg_heads/panoptic_fusion_heads/
maskformer_fusion_head.py, configs/mask2former/mask2former_r50_lsj_8x2_50e_coco.py`.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pec_jax.config import ConfigError
from pec_jax.errors import FileError
from pec_jax.host.client import Failure, Options, post
from pec_jax.host.geneval import CLASSES, COLOURS, THRESHOLD, Detection

# Images [N, H, W, 3] uint8 -> N lists of detections with a score above `THRESHOLD`; None for an
# image that could not be looked at.
Detector = Callable[[np.ndarray], list[list[Detection] | None]]

LONG_SIDE, SHORT_SIDE, DIVISOR = 1333, 800, 32  # of what the network sees, pixels
# Of ImageNet's pixels in [0, 1].
MEAN = np.asarray((0.485, 0.456, 0.406), np.float32)
STD = np.asarray((0.229, 0.224, 0.225), np.float32)
MAX_PER_IMAGE = 100  # pairs of a query and a class
MAX_ANSWER = 64 * 2**20  # bytes of a server's answer
MAX_ANSWERED = 300  # detections in it


@dataclasses.dataclass(frozen=True)
class Sizes:
    """(height, width) of an image, of it resized, and of that padded."""

    original: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]


def sizes_of(height: int, width: int) -> Sizes:
    """The sizes of an image: as large as fits in 1333 x 800 either way, padded to 32."""
    factor = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    resized = (int(height * factor + 0.5), int(width * factor + 0.5))
    rows, columns = (-(-n // DIVISOR) * DIVISOR for n in resized)
    return Sizes((height, width), resized, (rows, columns))


def preprocess(image: np.ndarray, sizes: Sizes) -> np.ndarray:
    """What the network sees of an image.

    Args:
        image: [H, W, 3] uint8, RGB.
        sizes: of it.

    Returns:
        [3, padded height, padded width] fp32: resized (bilinear), normalised, and padded with
        zeros on the right and at the bottom.
    """
    height, width = sizes.resized
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    normalised = (np.asarray(resized, np.float32) / 255 - MEAN) / STD
    padded = np.zeros((3, *sizes.padded), np.float32)
    padded[:, :height, :width] = normalised.transpose(2, 0, 1)
    return padded


def read_outputs(class_logits: Any, mask_logits: Any, sizes: Sizes) -> list[Detection]:
    """The detections of one image, in mmdet's order of operations.

    Args:
        class_logits: torch [Q, 81]; the last class is "no object".
        mask_logits: torch [Q, h, w], over the padded image.
        sizes: of the image.

    Returns:
        Those above `THRESHOLD` of the 100 most probable pairs of a query and a class, best first.
    """
    from torch.nn.functional import interpolate

    probabilities = class_logits.float().softmax(-1)[:, :-1]
    count = min(MAX_PER_IMAGE, probabilities.numel())
    best = probabilities.flatten().topk(count)
    # A mask's mean probability is at most 1, so that the others cannot pass.
    pairs = [
        (probability, *divmod(index, probabilities.shape[1]))
        for probability, index in zip(best.values.tolist(), best.indices.tolist())
        if probability > THRESHOLD
    ]
    queries = sorted({query for _, query, _ in pairs})
    if not queries:
        return []
    height, width = sizes.resized
    logits = interpolate(mask_logits[None, queries].float(), sizes.padded, mode="bilinear")
    logits = interpolate(logits[..., :height, :width], sizes.original, mode="bilinear")[0]
    masks = {query: _read_mask(one) for query, one in zip(queries, logits)}
    detections = [
        Detection(label, probability * quality, box, mask=mask)
        for probability, query, label in pairs
        for quality, box, mask in [masks[query]]
    ]
    return sorted((d for d in detections if d.score > THRESHOLD), key=lambda d: -d.score)


def _read_mask(logits: Any) -> tuple[float, tuple[float, float, float, float], np.ndarray]:
    """The mean probability inside a mask, its bounding box, and the mask, of logits [H, W]."""
    inside = logits > 0
    quality = (logits.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
    mask = inside.cpu().numpy()
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0.0, (0.0, 0.0, 0.0, 0.0), mask
    start, end = (float(columns[0]), float(rows[0])), (float(columns[-1] + 1), float(rows[-1] + 1))
    return float(quality), (*start, *end), mask


def load_torch_model(class_name: str, directory: Path, device: str) -> Any:
    """A model of transformers, whole, in evaluation mode.

    Args:
        class_name: in transformers.
        directory: with its config and safetensors.
        device: of torch.

    Raises:
        ConfigError: torch is not installed, or has no such device.
        FileError: the directory does not hold such a model.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "config.rewards.geneval computes with torch in this process: install it with "
            "`pip install 'pec_jax[geneval]'`, or set detector to 'http' and leave clip empty."
        )
    import transformers

    kind = getattr(transformers, class_name)
    try:
        model, loading = kind.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise FileError(
            f"{directory}: no {class_name} can be loaded from it ({reason})."
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise FileError(
            f"{directory}: no {class_name}, for its weights lack {len(missing)} tensors, the first "
            f"of which is {missing[0]}."
        )
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"config.rewards.geneval.device: torch has no {device!r} here ({reason})."
        ) from error


def in_process(directory: Path, device: str = "cpu") -> Detector:
    """Mask2Former on torch, next to JAX, one image at a time.

    Args:
        directory: of a Mask2Former for COCO's instances, such as
            facebook/mask2former-swin-small-coco-instance.
        device: of torch.

    Raises:
        ConfigError, FileError: as `load_torch_model`; or the model has other classes.
    """
    model = load_torch_model("Mask2FormerForUniversalSegmentation", directory, device)
    import torch

    if model.config.num_labels != len(CLASSES):
        raise FileError(
            f"{directory}: a detector of {model.config.num_labels} classes, but GenEval needs "
            f"COCO's {len(CLASSES)}; use one that was trained on COCO's instances."
        )
    turn = threading.Lock()  # devices of a mesh ask at the same time, and share its memory

    @torch.inference_mode()
    def detect(images: np.ndarray) -> list[list[Detection] | None]:
        sizes = sizes_of(*images.shape[1:3])
        found: list[list[Detection] | None] = []
        for image in images:
            pixels = torch.from_numpy(preprocess(image, sizes))[None].to(device)
            with turn:
                outputs = model(pixel_values=pixels)
                logits = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
                found.append(read_outputs(*logits, sizes))
        return found

    return detect


def over_http(options: Options) -> Detector:
    """A server, as the module says, asked once for every image.

    An image for which there is no valid answer is left out, and the first reason is logged.

    Args:
        options: of the server.
    """

    def detect(images: np.ndarray) -> list[list[Detection] | None]:
        found = ask(options, images)
        failures = [one for one in found if isinstance(one, Failure)]
        if failures:
            logging.getLogger(__name__).warning(
                "GenEval's detector failed on %d of %d images, first because %s.",
                *(len(failures), len(images), failures[0].reason),
            )
        return [None if isinstance(one, Failure) else one for one in found]

    return detect


def ask(options: Options, images: np.ndarray) -> list[list[Detection] | Failure]:
    """What a server finds in images [N, H, W, 3] uint8, with the reason where it fails."""
    payloads = ({"images": [_to_png(image)], "threshold": THRESHOLD} for image in images)
    return [read_answer(answer, *images.shape[1:3]) for answer in post(options, "", payloads)]


def read_answer(answer: Any, height: int, width: int) -> list[Detection] | Failure:
    """A server's detections in one image, every field checked.

    Args:
        answer: decoded JSON, or the failure to get any.
        height: of the image.
        width: of the image.
    """
    if isinstance(answer, Failure):
        return answer
    lists = answer.get("detections") if isinstance(answer, dict) else None
    if not isinstance(lists, list) or len(lists) != 1 or not isinstance(lists[0], list):
        return Failure("the answer has no 'detections' with one list for the one image")
    if len(lists[0]) > MAX_ANSWERED:
        return Failure(f"the answer has {len(lists[0])} detections, more than {MAX_ANSWERED}")
    try:
        detections = [_read_detection(entry, height, width) for entry in lists[0]]
    except ValueError as error:
        return Failure(str(error))
    return [d for d in detections if d.score > THRESHOLD]


def _read_detection(entry: Any, height: int, width: int) -> Detection:
    """One object; ValueError with a clause if it is malformed."""
    if not isinstance(entry, dict):
        raise ValueError("a detection is not an object with fields")
    fields: list[Any] = [entry.get(n) for n in ("label", "score", "box", "colour", "mask")]
    label, score, box, colour, mask = fields
    if type(label) is not int or not 0 <= label < len(CLASSES):
        raise ValueError("a label is not a whole number from 0 to 79")
    if not _is_number(score) or not 0 <= score <= 1:
        raise ValueError("a score is not a number from 0 to 1")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise ValueError("a box is not a list of four numbers")
    x0, y0, x1, y1 = box
    # Regression may end a fraction of a pixel outside.
    if not (-1 <= x0 <= x1 <= width + 1 and -1 <= y0 <= y1 <= height + 1):
        raise ValueError("a box is not [x0, y0, x1, y1] in pixels of the image")
    if colour is not None and colour not in COLOURS:
        raise ValueError("a colour is not one of GenEval's ten")
    pixels = None if mask is None else _read_png_mask(mask, height, width)
    return Detection(
        label, float(score), (float(x0), float(y0), float(x1), float(y1)), colour, pixels
    )


def _is_number(value: Any) -> bool:
    """A finite int or float that fits in a float; not a bool."""
    return type(value) in (int, float) and abs(value) < 1e9


def _to_png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _read_png_mask(text: Any, height: int, width: int) -> np.ndarray:
    """[H, W] bool; ValueError with a clause if it is no such PNG."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        # Before any pixel is decoded, for a small file may hold a huge image.
        if image.size == (width, height) and image.mode in ("1", "L"):
            return np.asarray(image.convert("L")) > 127
    except Exception as error:  # Pillow raises errors of many kinds on broken files
        raise ValueError(f"a mask is not base64 of a PNG ({type(error).__name__})") from error
    raise ValueError("a mask is not a grey PNG of the image's size")
