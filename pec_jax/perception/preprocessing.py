"""Image preprocessing inside the graph, as `preprocessor_config.json` describes it.

    [0, 1] images -> resize -> centre crop -> rescale -> (x - mean) / std

The processors of transformers resize 8-bit images with Pillow: one axis after the other, each
pass rounded to 8 bits again. `resize` gives the same values, to the last bit, and lets gradients
pass through the rounding; `resize_float` is the same without any rounding. (Columns come first
here, always; Pillow 13 takes the rows of an image that is much taller than wide first, and then
values near sharp edges differ by a few levels.) Images that already have the right size are not
touched: whether they are rounded to 8 bits is the caller's business (`to_uint8_levels`).
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pec_jax.models import hf_config
from pec_jax.models.resampling import FILTERS, resize_weights

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORTEST_EDGE: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
HALF = (0.5, 0.5, 0.5)


def _squashed(side: int, resample: int, mean: tuple = HALF, std: tuple = HALF) -> dict[str, Any]:
    return {
        "size": {"height": side, "width": side},
        "resample": resample,
        "do_center_crop": False,
        "image_mean": mean,
        "image_std": std,
    }


# What a file leaves out is as in its own class: CLIPImageProcessor, ViTImageProcessor, and
# BitImageProcessor, which DINOv2 uses and whose defaults are CLIP's; and so on.
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": SHORTEST_EDGE,
    "dinov2": SHORTEST_EDGE,
    "dinov2_with_registers": SHORTEST_EDGE,
    "dinov3_vit": _squashed(224, 2, IMAGENET_MEAN, IMAGENET_STD),
    "vit": _squashed(224, 2),
    "siglip": _squashed(224, 3),
    "siglip_vision_model": _squashed(224, 3),
    "blip": _squashed(384, 3, CLIP_MEAN, CLIP_STD),
}
FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
PIL, FLOAT = "pil", "float"
ROUNDINGS = (PIL, FLOAT)
# Their processors never had 8-bit images: transformers resizes DINOv3's as tensors.
NEVER_ROUNDED = ("dinov3_vit",)


def _straight_through(value: Array, x: Array) -> Array:
    """`value`, with the gradient of `x`; the difference added is exactly zero."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))


def to_uint8_levels(images: Float[Array | np.ndarray, "*n"]) -> Float[Array, "*n"]:
    """Rounds images to the values that a saved PNG would hold, round(255 x) / 255.

    Args:
        images: [..., H, W, C]; what lies outside [0, 1] is clipped.

    Returns:
        The same shape, multiples of 1/255 in [0, 1]; the gradient passes straight through the
        rounding, but not where a value was clipped.
    """
    x = jnp.clip(images.astype(jnp.float32), 0.0, 1.0)
    return _straight_through(jnp.round(x * 255.0) / 255.0, x)


def _resample(levels: Array, size: int, axis: int, resample: int) -> Array:
    """One pass over one axis: whole levels in [0, 255] to whole levels.

    Pillow sums integers, weights of 22 fractional bits. An fp32 sum would fall on the wrong side
    of many a half, so the weights are split in two parts of 11 bits, whose sums are exact in fp32,
    and put together as integers.
    """
    matrix = resize_weights(levels.shape[axis], size, resample)
    fixed = np.floor(np.abs(matrix) * 2**22 + 0.5) * np.sign(matrix)
    coarse = np.floor(fixed / 2**11)
    high, low = (
        jnp.moveaxis(
            # 8 bits times 11 do not survive the bf16 products that some chips make by default.
            jnp.tensordot(levels, part, (axis, 1), precision=jax.lax.Precision.HIGHEST),
            -1,
            axis,
        )
        for part in (coarse.astype(np.float32), (fixed - coarse * 2**11).astype(np.float32))
    )
    total = (high.astype(jnp.int32) << 11) + low.astype(jnp.int32)
    rounded = jnp.clip((total + (1 << 21)) >> 22, 0, 255).astype(jnp.float32)
    smooth = jnp.clip(high * 2.0**-11 + low * 2.0**-22, 0.0, 255.0)
    return _straight_through(rounded, smooth)


def resize(
    images: Float[Array | np.ndarray, "n h w c"], height: int, width: int, resample: int
) -> Float[Array | np.ndarray, "n out_h out_w c"]:
    """Resizes as Pillow does 8-bit images: columns, then rows, 8 bits after each pass.

    Args:
        images: [N, H, W, C] in [0, 1]; rounded to 8 bits first if anything changes.
        height: wanted, pixels.
        width: wanted, pixels.
        resample: Pillow's number of the filter, 2 (bilinear) or 3 (bicubic).

    Returns:
        [N, height, width, C] in [0, 1], multiples of 1/255; `images` itself if nothing changes.
    """
    old_height, old_width = images.shape[1:3]
    if (old_height, old_width) == (height, width):
        return images
    levels = to_uint8_levels(images) * 255.0
    levels = _straight_through(jnp.round(levels), levels)  # k / 255 * 255 need not be k
    if old_width != width:
        levels = _resample(levels, width, 2, resample)
    if old_height != height:
        levels = _resample(levels, height, 1, resample)
    return levels / 255.0


def resize_float(
    images: Float[Array | np.ndarray, "n h w c"], height: int, width: int, resample: int
) -> Float[Array | np.ndarray, "n out_h out_w c"]:
    """`resize` without rounding, as torch resizes tensors with antialiasing."""
    x = images
    for axis, size in ((2, width), (1, height)):
        if x.shape[axis] != size:
            weights = jnp.asarray(resize_weights(x.shape[axis], size, resample), jnp.float32)
            x = jnp.tensordot(x, weights, (axis, 1), precision=jax.lax.Precision.HIGHEST)
            x = jnp.moveaxis(x, -1, axis)
    return x


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """One `preprocessor_config.json`, ready to be applied to batches in a graph."""

    shortest_edge: int | None  # resize the shorter side to this, keeping the aspect ratio, or
    longest_edge: int | None  # the longer side, filling up with black to a square, or
    size: tuple[int, int] | None  # resize to this (height, width); all None: no resize
    resample: int
    crop: tuple[int, int] | None  # (height, width) cut out of the middle
    scale: float  # of values in [0, 1]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounded: bool = True  # resize 8-bit images, as Pillow does

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], kind: str, rounding: str = PIL) -> Preprocessor:
        """Reads a preprocessor_config.json, old (sizes as numbers) or new (as dictionaries).

        Args:
            values: the dictionary.
            kind: the model_type of config.json, for the entries that the file leaves out.
            rounding: of `ROUNDINGS`.

        Returns:
            The preprocessor.

        Raises:
            ValueError: an entry that we cannot compute; the message names it and its value.
        """
        values = {**DEFAULTS[kind], **{k: v for k, v in values.items() if v is not None}}
        for key in FLAGS:
            hf_config.check_value(key, values.get(key, True), "bool")
        resample = values["resample"]
        hf_config.check_choice("resample", resample, list(FILTERS))  # Pillow's numbers
        edge, longest, size = None, None, None
        if values.get("do_resize", True):
            edge, longest, size = _read_size("size", values["size"], square=kind == "vit")
        if bool(values.get("do_pad")) != (longest is not None):
            raise ValueError(
                "do_pad is supported with size = {'longest_edge': n}, and needed there"
            )
        crop = None
        if values["do_center_crop"]:
            crop = _read_size("crop_size", values.get("crop_size", 224), square=True)[2]
        rescale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
        hf_config.check_value("rescale_factor", rescale, "float")
        normalize = values.get("do_normalize", True)
        return cls(
            shortest_edge=edge,
            longest_edge=longest,
            size=size,
            resample=resample,
            crop=crop,
            scale=255.0 * rescale,
            mean=_read_colour("image_mean", values["image_mean"]) if normalize else (0.0,),
            std=_read_colour("image_std", values["image_std"]) if normalize else (1.0,),
            rounded=rounding == PIL and kind not in NEVER_ROUNDED,
        )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing and cropping an image of the given size."""
        if self.longest_edge is not None:
            return (self.longest_edge, self.longest_edge)
        return self.crop or self._resized(height, width)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.shortest_edge is not None:
            short, long = sorted((height, width))
            other = int(self.shortest_edge * long / short)
            return (self.shortest_edge, other) if height <= width else (other, self.shortest_edge)
        if self.longest_edge is not None:
            scale = self.longest_edge / max(height, width)
            return round(height * scale), round(width * scale)
        return self.size or (height, width)

    def __call__(
        self, images: Float[Array | np.ndarray, "n h w c"]
    ) -> Float[Array, "n out_h out_w c"]:
        """Prepares images for an encoder.

        Args:
            images: [N, H, W, 3] in [0, 1].

        Returns:
            [N, h, w, 3] fp32, normalised.

        Raises:
            ValueError: the crop is larger than the resized image.
        """
        size = self._resized(*images.shape[1:3])
        resized = resize if self.rounded else resize_float
        x = jnp.asarray(resized(images, *size, self.resample))
        if self.longest_edge is not None:
            x = _padded(x, self.longest_edge)
        if self.crop is not None:
            (height, width), (crop_height, crop_width) = x.shape[1:3], self.crop
            if crop_height > height or crop_width > width:
                raise ValueError(
                    f"preprocessor_config.json: crop_size {self.crop} is larger than the resized "
                    f"images, {(height, width)}"
                )
            top, left = (height - crop_height) // 2, (width - crop_width) // 2
            x = x[:, top : top + crop_height, left : left + crop_width]
        mean, std = (jnp.asarray(v, jnp.float32) for v in (self.mean, self.std))
        return (x.astype(jnp.float32) * self.scale - mean) / std


def _padded(x: Array, side: int) -> Array:
    """Black bars around [N, h, w, C] up to a square; of an odd rest less at the top and left."""
    bars = [(missing // 2, missing - missing // 2) for missing in (side - n for n in x.shape[1:3])]
    return jnp.pad(x, ((0, 0), *bars, (0, 0)))


def _read_colour(key: str, value: Any) -> tuple[float, ...]:
    """A number for each channel, red, green and blue."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"{key} = {reprlib.repr(value)} is not supported: it must be 3 numbers")
    for number in value:
        hf_config.check_value(key, number, "float")
    return tuple(value)


def _read_size(
    key: str, value: Any, square: bool
) -> tuple[int | None, int | None, tuple[int, int] | None]:
    """(shortest edge, longest edge, (height, width)), two of them None."""
    entries = value if isinstance(value, Mapping) else {"shortest_edge": value}
    for side in entries.values():
        hf_config.check_value(key, side, "int")
    if not isinstance(value, Mapping):
        return (None, None, (value, value)) if square else (value, None, None)
    if set(value) == {"shortest_edge"}:
        return value["shortest_edge"], None, None
    if set(value) == {"longest_edge"}:
        return None, value["longest_edge"], None
    if set(value) == {"height", "width"}:
        return None, None, (value["height"], value["width"])
    raise ValueError(
        f"{key} = {reprlib.repr(value)} is not supported: it must be a number, "
        "{'shortest_edge': n}, {'longest_edge': n} or {'height': n, 'width': n}"
    )
