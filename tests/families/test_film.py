"""Nothing outside a family assumes latents [h, w, C], a pooled text, or a text without a mask."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.data.embedding_store import EmbeddingStore, write_store
from pec_jax.data.embeddings import EmbeddingsInMemory
from pec_jax.data.stream import repeat_groups
from pec_jax.families import registry
from pec_jax.families.pipeline import load_pipeline
from pec_jax.families.tiny import write_pipeline
from pec_jax.flow.likelihood import output_log_prob
from pec_jax.flow.sampler import FlowSampler
from pec_jax.types import Transition
from tests.conftest import small_config_dict
from tests.families.film import Film

PROMPTS = ["a thing", "a small red cat in the snow", ""]
STEPS = 3


@pytest.fixture(scope="module")
def family():
    """The family is known to the registry, which is all that adding one takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "FAMILIES", (*registry.FAMILIES, Film))
        yield Film


@pytest.fixture(scope="module")
def root(family, tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("film") / "model", "film")


@pytest.fixture(scope="module")
def pipeline(root):
    return load_pipeline(root)


def bound(pipeline, guidance, negative, text):
    """The guided velocity with the base model's weights and some prompts in place."""
    model = pipeline.guide(guidance, negative)
    return lambda x_t, sigma: model(pipeline.transformer_variables, x_t, sigma, text)


def sampler_of(pipeline, **options):
    return FlowSampler(pipeline.sigmas(STEPS, pipeline.latent_shape()), **options)


@pytest.fixture(scope="module")
def drawn(pipeline):
    """(text of two images of each of two prompts, negative text, start)."""
    encoded = pipeline.text.encode(PROMPTS)
    text = repeat_groups(jax.tree.map(lambda a: a[:2], encoded), 2)
    negative = jax.tree.map(lambda a: a[2:], encoded)
    x_1 = jax.random.normal(jax.random.key(0), (4, *pipeline.latent_shape()))
    return text, negative, x_1


def test_what_the_directory_says(pipeline):
    assert isinstance(pipeline, Film)
    assert pipeline.latent_shape() == (3, 8, 8, 4)
    assert pipeline.latent_shape(16, 24) == (3, 4, 6, 4)
    sigmas = pipeline.sigmas(STEPS, pipeline.latent_shape())
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == STEPS + 1


def test_the_text_has_a_mask_and_no_pooled_vector(pipeline):
    encoded = pipeline.text.encode(PROMPTS)
    assert encoded.pooled is None and encoded.mask.dtype == bool
    # "a", "shape" and T5's end token; more words in the second, the end alone in the third.
    lengths = encoded.mask.sum(1)
    assert lengths[0] == 3 and lengths[1] > 3 and lengths[2] == 1
    shapes = pipeline.conditioning_shapes()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape[1:], a.dtype), encoded
    )


def test_padding_is_not_read(pipeline, drawn):
    text, negative, x_1 = drawn
    noise = jnp.where(text.mask[..., None], 0.0, 7.0)
    velocity = pipeline.guide(5.0, negative)
    found, same = (
        velocity(pipeline.transformer_variables, x_1, jnp.float32(0.5), t)
        for t in (text, text.replace(tokens=text.tokens + noise))
    )
    np.testing.assert_allclose(found, same, atol=1e-6)
    other = text.replace(mask=jnp.ones_like(text.mask))
    other = velocity(pipeline.transformer_variables, x_1, jnp.float32(0.5), other)
    assert np.abs(found - other).max() > 1e-3


def test_guidance_is_classifier_free(pipeline, drawn):
    text, negative, x_1 = drawn
    whole = jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), 4, 0), negative)
    variables, sigma = pipeline.transformer_variables, jnp.float32(0.7)
    v_pos, v_neg = (pipeline.velocity(variables, x_1, sigma, t) for t in (text, whole))
    for form in (negative, whole, jax.tree.map(lambda a: a[0], negative)):
        found = pipeline.guide(5.0, form)(variables, x_1, sigma, text)
        np.testing.assert_allclose(found, v_neg + 5.0 * (v_pos - v_neg), atol=1e-5)


def test_a_step_is_scored_as_it_was_taken(pipeline, drawn):
    text, negative, x_1 = drawn
    velocity = bound(pipeline, pipeline.default_guidance, negative, text)
    sampler = sampler_of(
        pipeline, kernel="flow_sde", noise_level=0.7, stochastic=(True, True, False)
    )
    path = sampler.sample(velocity, x_1, jax.random.key(1))
    assert path.x_0.shape == (4, 3, 8, 8, 4) and path.logp.shape == (STEPS, 4)
    for t in sampler.trained_steps:
        taken = Transition(path.x_t[t], path.x_next[t], sampler.sigmas[t], sampler.sigmas[t + 1])
        logp, mean, _ = sampler.log_prob(velocity, taken)
        assert mean.shape == path.x_t[t].shape
        np.testing.assert_allclose(logp, path.logp[t], atol=1e-5)


def test_likelihood_and_images(pipeline, drawn):
    text, negative, x_1 = drawn
    velocity, sampler = bound(pipeline, 1.0, negative, text), sampler_of(pipeline)
    logp, x_0 = output_log_prob(velocity, x_1, sigmas=sampler.sigmas, key=jax.random.key(2))
    assert logp.shape == (4,) and np.isfinite(logp).all() and x_0.shape == x_1.shape
    latents = sampler.final(velocity, x_1, None)
    images = pipeline.decode(pipeline.vae_variables, latents)
    assert images.shape == (4, 32, 32, 3) and 0 <= images.min() <= images.max() <= 1


def test_stored_text_keeps_the_fields_there_are(pipeline, tmp_path):
    encoded = pipeline.text.encode(PROMPTS)
    write_store(tmp_path, PROMPTS, "mark", pipeline.text.encode, dtype=jnp.bfloat16)
    store = EmbeddingStore(tmp_path)
    found = store.gather(store.rows(PROMPTS[::-1]))
    assert found.pooled is None and found.mask.dtype == bool
    np.testing.assert_array_equal(found.mask, encoded.mask[::-1])
    np.testing.assert_allclose(found.tokens, encoded.tokens[::-1], rtol=2**-8)
    in_memory = EmbeddingsInMemory(encoded).gather(np.array([2, 0]))
    assert in_memory.pooled is None
    np.testing.assert_array_equal(in_memory.mask, encoded.mask[[2, 0]])


def test_a_whole_run(root, tmp_path):
    from pec_jax.training import trainer

    config = small_config_dict()
    config.num_iterations = 1
    config.model.path = str(root)
    config.trainable.targets = (r"attn\.to_[qkv]$",)
    trainer.train(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    step = next(line for line in map(json.loads, lines) if "reward/mean" in line)
    assert step["policy/grad_norm"] > 0 and step["policy/ratio_max_deviation"] == 0
