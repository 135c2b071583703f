"""Encoders that are Hugging Face directories of a known kind."""

from __future__ import annotations

from pec_jax.perception.definition import EncoderOptions, register
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.networks import Networks

NAMES = ("clip", "dino", "dinov2", "dinov3", "pickscore", "siglip2")


def _register(name: str) -> None:
    @register(name)
    def make(options: EncoderOptions, networks: Networks) -> Encoder:
        return networks.encoder(name, options.model)


for _name in NAMES:
    _register(_name)
