"""Flow matching: its target, its noise levels, and its captions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import transformer
from pec_jax.types import Conditioning


def test_the_true_velocity_has_no_loss():
    """With x_0 = 0, x_t = sigma eps and the velocity eps is x_t / sigma."""
    x_0 = jnp.zeros((64, 16, 16, 4))

    def velocity(x_t, sigma, conditioning):
        return x_t / sigma[:, None, None, None]

    value = transformer.flow_matching_loss(velocity, x_0, None, jax.random.key(0))
    np.testing.assert_allclose(value, 0.0, atol=1e-8)


def test_the_zero_velocity_costs_the_variance_of_the_target():
    x_0 = 2.0 * jax.random.normal(jax.random.key(0), (512, 16, 16, 4))
    value = transformer.flow_matching_loss(
        lambda x_t, sigma, c: jnp.zeros_like(x_t), x_0, None, jax.random.key(1)
    )
    np.testing.assert_allclose(value, 4.0 + 1.0, rtol=0.02)


def test_noise_levels_are_logit_normal():
    seen = []

    def velocity(x_t, sigma, conditioning):
        seen.append(sigma)
        return x_t

    transformer.flow_matching_loss(velocity, jnp.zeros((4096, 1, 1, 1)), None, jax.random.key(0))
    logits = np.log(seen[0] / (1 - seen[0]))
    np.testing.assert_allclose(logits.mean(), transformer.LOGIT_MEAN, atol=0.02)
    np.testing.assert_allclose(logits.std(), transformer.LOGIT_STD, atol=0.02)


def test_the_distilled_velocity_is_the_guided_one():
    """All x_0 are m, so that a caption's velocity is -m, and the empty prompt's is b.

    The loss has no gradient where the caption's velocity is b + guidance (-m - b), and it never
    moves the empty prompt's.
    """
    m, b, guidance, n = 0.7, 0.2, 3.0, 64
    caption = Conditioning(tokens=jnp.ones((n, 1, 1)), pooled=jnp.ones((n, 1)))
    empty = Conditioning(tokens=jnp.zeros((1, 1, 1)), pooled=jnp.zeros((1, 1)))

    def loss(velocities):
        def velocity(x_t, sigma, text):
            value = jnp.where(text.pooled == 1.0, velocities["caption"], velocities["empty"])
            return jnp.broadcast_to(value[:, :, None, None], x_t.shape)

        return transformer.flow_matching_loss(
            velocity,
            jnp.full((n, 32, 32, 4), m),
            caption,
            jax.random.key(0),
            transformer.Guided(empty, lambda sigma: jnp.full_like(sigma, guidance)),
        )

    fixed = {"caption": jnp.array(b + guidance * (-m - b)), "empty": jnp.array(b)}
    slope = jax.grad(loss)(fixed)
    np.testing.assert_allclose(slope["caption"], 0.0, atol=0.02)  # 4 standard errors of the noise
    assert float(slope["empty"]) == 0.0
    assert float(jax.grad(loss)(fixed | {"caption": jnp.array(-m)})["caption"]) > 1.0


def test_batches_pair_latents_with_captions_that_fit():
    """Latents carry their attributes, and the text table its own row numbers."""
    key = jax.random.key(0)
    attributes = shapes.fill_open(key, jnp.full((300, 6), shapes.OPEN))
    latents = jnp.zeros((300, 16, 16, 4)).at[:, 0, 0, 0].set(shapes.caption_index(attributes))
    rows = jnp.arange(shapes.NUM_CAPTIONS + 1, dtype=jnp.float32)
    text = Conditioning(tokens=rows[:, None, None], pooled=rows[:, None])
    pool = transformer.Pool(latents, attributes, text)
    x_0, conditioning = transformer.draw_batch(pool, jax.random.key(1), 2000)
    table = shapes.all_attributes()
    captions = np.asarray(conditioning.pooled[:, 0]).astype(int)
    empty = captions == transformer.EMPTY
    assert 0.07 < empty.mean() < 0.13
    shown = table[np.asarray(x_0[:, 0, 0, 0]).astype(int)][~empty]
    named = table[captions[~empty]]
    np.testing.assert_array_equal(named[named >= 0], shown[named >= 0])
    chance = 1 / 7  # the mean of (1 - s)^6, s uniform: no attribute hidden
    full = chance + (1 - chance) * transformer.SPECIFIED_SHARE
    assert abs((named >= 0).all(-1).mean() - full) < 0.05  # 4 standard errors of 1800 captions
