"""ImageReward's image encoder: the class token of its vision transformer, whatever the prompt."""

from __future__ import annotations

from pec_jax.perception.definition import EncoderOptions, register
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.networks import Networks
from pec_jax.perception.published import IMAGE_REWARD


@register("imagereward")
def make(options: EncoderOptions, networks: Networks) -> Encoder:
    """The same network as the reward's, which it shares."""
    return networks.encoder("imagereward", options.model, IMAGE_REWARD)
