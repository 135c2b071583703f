"""The empty pipeline of the new world: what differs from `pec_jax.shapes.pretraining.skeleton`."""

from __future__ import annotations

from typing import Any

from pec_jax.shapes.pretraining import skeleton
from pec_jax.shapes.pretraining.loop import Session
from pec_jax.world import scenes as shapes

CLIP_VISION = skeleton.CLIP_VISION | {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "image_size": shapes.IMAGE_SIZE,
}
# The preference model that only evaluates sees coarser patches, through fewer and wider layers.
HPS_VISION = CLIP_VISION | {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "patch_size": 16,
}
VIT = skeleton.VIT | {
    "hidden_size": 96,
    "intermediate_size": 384,
    "image_size": shapes.IMAGE_SIZE,
}
VAE = skeleton.VAE | {
    "block_out_channels": [8, 16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "sample_size": shapes.IMAGE_SIZE,
}
TRANSFORMER = skeleton.TRANSFORMER | {
    "sample_size": shapes.IMAGE_SIZE // 8,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 5,
    "attention_head_dim": 32,
    "caption_projection_dim": 128,
}
SIZES = skeleton.Sizes(
    shapes.all_captions,
    shapes.IMAGE_SIZE,
    VAE,
    TRANSFORMER,
    VIT,
    {
        "clip": CLIP_VISION,
        "pickscore": CLIP_VISION,
        "pickscore_taste": CLIP_VISION,
        "hps": HPS_VISION,
    },
)


def run(session: Session) -> dict[str, Any]:
    """Stage `skeleton`: everything that is not trained by gradients."""
    return skeleton.build(session.out, SIZES)
