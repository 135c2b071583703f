"""The architectures that are known by name: their parameters are counted, nothing is loaded."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pec_jax.families import published
from pec_jax.families.pipeline import load_pipeline
from pec_jax.perception.encoders import load_encoder


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("sd3.5-medium", 2_243_171_520),
        ("sd3.5-large", 8_056_627_520),
        ("flux.1-dev", 11_901_408_320),
    ],
)
def test_pipelines(tmp_path, name, parameters):
    pipeline = load_pipeline(published.write(name, tmp_path), text=False, weights=False)
    assert count(pipeline.transformer_variables["params"]) == parameters
    assert count(pipeline.vae_variables) == 83_819_683  # diffusers' AutoencoderKL of this config


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("pickscore_v1", 986_109_441),
        ("clip-vit-large-patch14", 427_616_513),
        ("dino-vitb16", 85_798_656),
    ],
)
def test_encoders(tmp_path, name, parameters):
    encoder = load_encoder(published.write(name, tmp_path), weights=False)
    assert count(encoder.params["params"]) == parameters


@pytest.mark.parametrize(
    "path, name",
    [
        ("models/sd3.5-medium", "sd3.5-medium"),
        ("stabilityai/stable-diffusion-3.5-medium@abc123", "sd3.5-medium"),
        ("black-forest-labs/FLUX.1-dev", "flux.1-dev"),
        ("models/PickScore_v1", "pickscore_v1"),
        ("models/another", None),
    ],
)
def test_names(path, name):
    assert published.find(path) == name
