"""The encoders that are known by name: their parameters are counted, nothing is loaded."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pec_jax.perception.loading import load_encoder
from pec_jax.perception.published import ENCODERS
from pec_jax.weights.published import find, write


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("pickscore_v1", 986_109_441),
        ("clip-vit-large-patch14", 427_616_513),
        ("dfn5b-clip-vit-h-14-378", 986_109_441 + (27**2 - 16**2) * 1280),
        ("hps_v2.1_compressed.pt", 986_109_441),
        ("imagereward.pt", 445_739_522 - (1024 + 768 + 2) * 256 - 2 * (768 + 1)),
        ("siglip-so400m-patch14-384", 428_225_600),
        ("dino-vitb16", 85_798_656),
    ],
)
def test_encoders(tmp_path, name, parameters):
    _, variables = load_encoder(write(ENCODERS[name], tmp_path), weights=False)
    leaves = jax.tree.leaves(variables["params"])
    sizes = [int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves]
    assert sum(sizes) == parameters


def test_names():
    assert find("models/PickScore_v1", ENCODERS) is ENCODERS["pickscore_v1"]
    assert find("models/another", ENCODERS) is None
