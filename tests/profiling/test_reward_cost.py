"""What rewards in the step cost: their FLOPs, counted, beside those of an image's training."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pec_jax.config.registry import REWARDS
from pec_jax.perception import published
from pec_jax.perception.networks import Networks
from pec_jax.profiling import flops
from pec_jax.weights.published import find, write

# One SD3.5-M image of an iteration at 512 px: ten steps with guidance, nine trained, KL, remat.
IMAGE_TFLOP = 207.0
# Files that shapes do without.
FILES = {
    "aesthetic_v2_5": {"head": "head.pth"},
    "aesthetic_laion": {"head": "head.pth"},
    "imagereward": {"tokenizer": "models/bert-base-uncased"},
}
MODELS = {
    "pickscore": "pickscore_v1",
    "hpsv2": "HPS_v2.1_compressed.pt",
    "imagereward": "ImageReward.pt",
    "aesthetic_v2_5": "siglip-so400m-patch14-384",
    "aesthetic_laion": "clip-vit-large-patch14",
    "clip": "dfn5b-clip-vit-h-14-378",
}


def planned(tmp_path: Path) -> Networks:
    def locate(name: str) -> Path:
        return write(find(name, published.ENCODERS), tmp_path / name)

    return Networks(own=tmp_path, locate=locate, dtype=jnp.bfloat16, weights=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_reward_costs_less_than_half_a_percent_of_an_image(tmp_path, name):
    networks = planned(tmp_path)
    options = REWARDS[name].options(model=MODELS[name], **FILES.get(name, {}))
    reward = REWARDS[name].make(options, networks)
    keys = reward.network if isinstance(reward.network, tuple) else (reward.network,)
    variables = tuple(networks.variables[key] for key in keys)
    images = jax.ShapeDtypeStruct((1, 1, 512, 512, 3), jnp.float32)
    inputs = reward.input_shapes(1)
    arguments = (variables if len(keys) > 1 else variables[0], images, inputs)
    count = flops.count(reward.score, *arguments) / 1e12
    assert 0.1 < count < 0.005 * IMAGE_TFLOP


def test_the_whole_suite_shares_what_it_can(tmp_path):
    """PickScore and HPSv2 are networks of one size, and two of them; CLIP L/14 serves two."""
    networks = planned(tmp_path)
    for name, model in (MODELS | {"clip": "clip-vit-large-patch14"}).items():
        extra = {"head": f"{name}.pth"} if name.startswith("aesthetic") else {}
        REWARDS[name].make(REWARDS[name].options(model=model, **extra), networks)
    sizes = {
        key: sum(a.size for a in jax.tree.leaves(variables))
        for key, variables in networks.without_text().items()
    }
    assert len(sizes) == 5 + 3  # five networks and three heads
    total = 2 * sum(sizes.values()) / 1e9  # GB in bfloat16, without text towers of CLIP
    assert total == pytest.approx(5.1, abs=0.3)
