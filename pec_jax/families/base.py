"""What a family of pipelines is: the base class that every family fills in."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from pec_jax.config import ConfigError
from pec_jax.families.networks import AUTOENCODER_KL, Network
from pec_jax.families.text import TextEncoder
from pec_jax.flow import schedule
from pec_jax.flow.sampler import VelocityFn, guided
from pec_jax.models import vae
from pec_jax.models.text import Combine, TextStack
from pec_jax.types import Array, Conditioning, PyTree
from pec_jax.weights.published import Files

# (guidance scale, negative conditioning) -> velocity function
Guide = Callable[[float, Conditioning | None], VelocityFn]


@dataclasses.dataclass(frozen=True)
class Pipeline(abc.ABC):
    """A loaded text-to-image model. A family is a subclass, which holds all that the family is.

    To add a family, write its network under `models/`, one file like `flux.py` beside this one,
    and name its class in `registry.FAMILIES`. Nothing else in the package knows a family. The file
    says, in this order:

    1. *The directory*, in class attributes: `class_name` of the pipeline, and a `Network` for the
       transformer and, unless it is diffusers' AutoencoderKL, for the VAE. Module and parameter
       names are diffusers', so that weights and LoRA files need no table of names; names of the
       model's own code in LoRA files may get rows in `weights.lora_names`.
    2. *The text*: `text_encoders` (a new kind of encoder is a function like `text.t5_encoder`),
       `combiner`, which makes a `Conditioning` of their outputs, and `conditioning_shapes`, the
       same as shapes. A family leaves `pooled` or `mask` out by leaving them None. A prompt
       template is a tokenizer that wraps another one.
    3. *The velocity field*: `velocity` calls the network. Latents have any rank, channels last:
       [h, w, C] of an image, [frames, h, w, C] of a film. Guidance is classifier-free unless
       `embeds_guidance`.
    4. *Sizes and schedule*: `default_size`, `patch_size`, `transformer_channels`. The defaults of
       `latent_shape`, `sigmas` and `decode` are those of image models with a flow-matching Euler
       scheduler; override what differs.
    5. *Without weights*: the `published` architectures, for ahead-of-time compilation; `tiny`, a
       small config for tests, and `make_tiny_parts` where the other parts are not SD3's.

    `tests/families` holds what every family is tested with: its network and its latents after ten
    steps against diffusers, and a whole run at tiny size. `tests/families/film.py` is a whole
    family of a hundred lines, with a mask, no pooled text and latents [frames, h, w, C].

    Attributes:
        transformer: the velocity field.
        transformer_variables: {"params", "buffers"}.
        vae: the autoencoder.
        vae_variables: {"params"}.
        text: tokenizers and text encoders; None if they were not asked for.
        text_lengths: tokens of each text encoder, by the name of its tower; of absent ones too.
        scheduler: scheduler_config.json, as it is.
    """

    # The directory.
    name: ClassVar[str]  # short, for command lines
    class_name: ClassVar[str]  # of the pipeline, which model_index.json names
    transformer_network: ClassVar[Network]
    vae_network: ClassVar[Network] = AUTOENCODER_KL
    scheduler_class: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"
    text_encoders: ClassVar[tuple[TextEncoder, ...]]
    text_length: ClassVar[int]  # default tokens of the encoders without a length of their own
    # Whether the pipeline hands its scheduler sigmas 1, (T - 1) / T, ..., 1 / T to shift.
    evenly_spaced: ClassVar[bool] = False
    # Name of an architecture -> its config files.
    published: ClassVar[Mapping[str, Files]] = {}
    tiny: ClassVar[Mapping[str, Any]]  # the config of a small transformer

    transformer: Any
    transformer_variables: PyTree
    vae: Any
    vae_variables: PyTree
    text: TextStack | None
    text_lengths: Mapping[str, int]
    scheduler: Mapping[str, Any]

    # What a family says.

    @property
    @abc.abstractmethod
    def patch_size(self) -> int:
        """Latent pixels per image token, along one axis."""

    @property
    @abc.abstractmethod
    def default_size(self) -> int:
        """Height and width of an image, in pixels, that the model was trained for."""

    @property
    @abc.abstractmethod
    def default_guidance(self) -> float:
        """The guidance scale that the model is published with; 1 is off."""

    @property
    @abc.abstractmethod
    def transformer_channels(self) -> tuple[int, int]:
        """Channels of the latents that the transformer takes and returns."""

    @abc.abstractmethod
    def velocity(
        self,
        variables: PyTree,
        x_t: Array,
        sigma: Array,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Array:
        """The velocity field without classifier-free guidance.

        Args:
            variables: of the transformer.
            x_t: latents [N, ..., C].
            sigma: noise level in [0, 1], scalar or [N].
            conditioning: [N, ...].
            guidance: the scale, for models that take it as an input; else None.

        Returns:
            v = eps - x_0, [N, ..., C].
        """

    @classmethod
    @abc.abstractmethod
    def combiner(cls, root: Path, text_length: int) -> Combine:
        """How the outputs of the text encoders become one conditioning.

        Args:
            root: the pipeline's directory.
            text_length: tokens of the encoders without a length of their own.

        Returns:
            (outputs by tower, masks by tower) -> Conditioning [N, ...], fp32 whatever the towers
            compute in.
        """

    @abc.abstractmethod
    def conditioning_shapes(self) -> Conditioning:
        """The conditioning of one prompt, with shapes for arrays, from `text_lengths`."""

    # What a family may change.

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the transformer, as of distilled models."""
        return False

    @classmethod
    def shared_lengths(cls, lengths: Mapping[str, int]) -> dict[str, int]:
        """Tokens of each tower, where one tower's length holds for others; as they are."""
        return dict(lengths)

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, along one axis."""
        return self.vae.config.scale_factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.vae.config.latent_channels

    def latent_shape(self, height: int = 0, width: int = 0) -> tuple[int, ...]:
        """Shape of the latents of one image, such as (h, w, C).

        Args:
            height: of the image in pixels; 0 is the model's own size.
            width: likewise.

        Raises:
            ConfigError: the size is not a whole number of patches.
        """
        height, width = height or self.default_size, width or self.default_size
        unit = self.vae_scale_factor * self.patch_size
        for name, size in (("height", height), ("width", width)):
            if size % unit:
                near = max(unit, round(size / unit) * unit)
                raise ConfigError(
                    f"{name} is {size} pixels; this model takes multiples of {unit}, "
                    f"such as {near}."
                )
        factor = self.vae_scale_factor
        return height // factor, width // factor, self.latent_channels

    def sigmas(self, num_steps: int, latent_shape: tuple[int, ...]) -> np.ndarray:
        """The model's own noise schedule [num_steps + 1] for latents of a shape, from 1 to 0."""
        tokens = math.prod(latent_shape[:-1]) // self.patch_size**2
        return schedule.from_scheduler_config(
            self.scheduler, num_steps, tokens, evenly=self.evenly_spaced
        )

    def decode(self, variables: PyTree, latents: Array) -> Array:
        """The decoder: latents as the sampler leaves them to images.

        Args:
            variables: of the VAE.
            latents: [N, ..., C].

        Returns:
            Images [N, H, W, 3] in [0, 1], fp32.
        """
        latents = vae.unscale_latents(self.vae.config, latents)
        images = self.vae.apply(variables, latents, method="decode")
        return jnp.clip(images.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)

    @classmethod
    def make_tiny_parts(cls, root: Path) -> None:
        """Changes a copy of the embedded Stable Diffusion 3 directory into one of this family.

        Args:
            root: the copy, without a transformer.
        """
        del root  # already of this family

    # What follows.

    def guide(self, scale: float, negative: Conditioning | None) -> VelocityFn:
        """The velocity function at a guidance scale.

        Models that were distilled with guidance take the scale as an input; all others get
        classifier-free guidance, which calls them a second time for the negative conditioning.

        Args:
            scale: guidance scale; 1 is off where it is classifier-free.
            negative: conditioning of the negative prompt, [1, ...] or [N, ...].

        Returns:
            v(variables, x_t [N, ..., C], sigma, conditioning) -> [N, ..., C].
        """
        if not self.embeds_guidance:
            return guided(self.velocity, scale, negative)

        def velocity(variables: PyTree, x_t: Array, sigma: Array, conditioning: Conditioning):
            return self.velocity(variables, x_t, sigma, conditioning, scale)

        return velocity

    def transformer_boxes(self) -> PyTree:
        """Shapes and logical axes of the transformer's variables, in linen's boxes."""
        return self.transformer_network.boxes(self.transformer)


def timesteps(scalar: float | Array, x_t: Array) -> Array:
    """A noise level or guidance scale, scalar or [N], as networks take it: times 1000, [N] fp32."""
    return jnp.broadcast_to(jnp.asarray(scalar, jnp.float32) * 1000.0, x_t.shape[:1])
