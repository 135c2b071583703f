"""What FLUX.1 does otherwise: its text, and guidance as an input of the network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.families.flux import combine
from pec_jax.families.pipeline import load_pipeline
from pec_jax.families.tiny import write_pipeline
from pec_jax.models.clip import CLIPTextOutput


def test_t5s_tokens_and_clips_end_of_text():
    hidden = jnp.ones((2, 6, 16), jnp.bfloat16)
    clip = CLIPTextOutput(hidden, hidden, jnp.full((2, 16), 4.0, jnp.bfloat16), None)
    found = combine({"clip": clip, "t5": jnp.full((2, 9, 40), 3.0, jnp.bfloat16)}, {})
    assert found.tokens.dtype == found.pooled.dtype == jnp.float32 and found.mask is None
    assert found.tokens.shape == (2, 9, 40) and (found.tokens == 3).all()
    assert found.pooled.shape == (2, 16) and (found.pooled == 4).all()


def test_guidance_is_an_input_where_it_was_distilled_and_classifier_free_elsewhere(tmp_path):
    dev = load_pipeline(write_pipeline(tmp_path / "dev", "flux"))
    other = write_pipeline(tmp_path / "schnell", "flux", {"guidance_embeds": False})
    schnell = load_pipeline(other, text=False)
    assert (dev.default_guidance, schnell.default_guidance) == (3.5, 1.0)
    text = dev.text.encode(["a thing", ""])
    positive, negative = (jax.tree.map(lambda a: a[i : i + 1], text) for i in (0, 1))  # noqa: B023
    x = jax.random.normal(jax.random.key(0), (1, *dev.latent_shape(32, 32)))
    sigma = jnp.float32(0.6)

    def apply(pipeline, conditioning, *scale):
        time, *extra = (jnp.full((1,), 1000 * s) for s in (0.6, *scale))
        return pipeline.transformer.apply(
            pipeline.transformer_variables,
            x,
            time,
            conditioning.tokens,
            conditioning.pooled,
            *extra,
        )

    found = dev.guide(2.5, None)(dev.transformer_variables, x, sigma, positive)
    # 1000 * 0.6 in fp32 and in Python differ by a rounding.
    np.testing.assert_allclose(found, apply(dev, positive, 2.5), atol=1e-4)
    found = schnell.guide(2.5, negative)(schnell.transformer_variables, x, sigma, positive)
    v_neg, v_pos = apply(schnell, negative), apply(schnell, positive)
    np.testing.assert_allclose(found, v_neg + 2.5 * (v_pos - v_neg), atol=1e-4)
