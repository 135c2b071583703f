"""The architectures that families know by name: parameters are counted, nothing is loaded."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pec_jax.families.pipeline import load_pipeline
from pec_jax.families.registry import published_pipelines
from pec_jax.weights.published import find, write


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
    root = write(published_pipelines()[name], tmp_path)
    pipeline = load_pipeline(root, text=False, weights=False)
    assert count(pipeline.transformer_variables["params"]) == parameters
    assert count(pipeline.vae_variables) == 83_819_683  # diffusers' AutoencoderKL of this config
    # 512 px: 32 x 32 tokens of 16 channels on 2 x 2 latent pixels.
    assert pipeline.latent_shape(512, 512) == (64, 64, 16)
    assert pipeline.default_size == 1024


@pytest.mark.parametrize(
    "name, length, width, pooled, guidance",
    [
        ("sd3.5-medium", 77 + 256, 4096, 768 + 1280, 4.5),
        ("flux.1-dev", 512, 4096, 768, 3.5),
    ],
)
def test_text_and_guidance_of_the_published_pipelines(
    tmp_path, name, length, width, pooled, guidance
):
    root = write(published_pipelines()[name], tmp_path)
    pipeline = load_pipeline(root, text=False, weights=False)
    shapes = pipeline.conditioning_shapes()
    assert shapes.tokens.shape == (length, width) and shapes.pooled.shape == (pooled,)
    assert pipeline.default_guidance == guidance
    shorter = load_pipeline(root, text=False, weights=False, t5_length=128).conditioning_shapes()
    assert shorter.tokens.shape == (length - pipeline.text_length + 128, width)


@pytest.mark.parametrize(
    "path, name",
    [
        ("models/sd3.5-medium", "sd3.5-medium"),
        ("stabilityai/stable-diffusion-3.5-medium@abc123", "sd3.5-medium"),
        ("black-forest-labs/FLUX.1-dev", "flux.1-dev"),
        ("models/another", None),
    ],
)
def test_names(path, name):
    models = published_pipelines()
    assert find(path, models) is (models[name] if name else None)
