"""Stage `transformer`: the velocity field, by conditional flow matching in the VAE's latents.

x_t = (1 - sigma) x_0 + sigma eps, loss |v(x_t, sigma, c) - (eps - x_0)|^2, sigma logit-normal
(Esser et al. 2024, section 3.1 and equation 19). Captions name random subsets of a scene's
attributes, so the model learns both to obey and to vary; one in ten is empty, for guidance. Now and
then a batch's captions are padded to diffusers' 256 tokens.

The last steps distil guidance into the weights, as FLUX.1-dev's were, so that training and sampling
need no second pass. The target becomes (eps - x_0) + w (v(x_t, c) - v(x_t, "")), without a gradient
through w's factor; its fixed point is guided by 1 / (1 - w) (Tang et al. 2025, "Diffusion Models
without Classifier-free Guidance", arXiv 2502.12154). How much depends on the noise, see
`distilled_guidance`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pec_jax.families.pipeline import load_text_stack
from pec_jax.models import mmdit
from pec_jax.models.vae import VAEConfig, scale_latents
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import common, skeleton, t5, tokenizers, vae
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit
from pec_jax.types import Conditioning

STEM = "diffusion_pytorch_model"
BATCH = 64
POOL = 65536  # scenes encoded once; a step draws from them
HELD_OUT = 2048  # of the pool, never trained on
LONG_LENGTH = 256  # of T5's part, diffusers' default
EMPTY = shapes.NUM_CAPTIONS  # row of the empty prompt in the table of text embeddings
EMPTY_SHARE = 0.1
LOGIT_MEAN, LOGIT_STD = 0.4, 1.2  # towards noise, where the shifted sampler spends its steps
SPECIFIED_SHARE = 0.5  # of the captions name everything for sure
GUIDED_SPECIFIED_SHARE = 0.3  # while GUIDED: open prompts are the harder ones
LONG_EVERY, LONG_BATCH, LONG_CAPTIONS = 16, 16, 2048  # batches with 256 tokens, and their texts
RECIPE = Recipe(
    "transformer",
    steps=10000,
    learning_rate=6e-3,
    warmup=500,
    weight_decay=0.01,
    ema_decay=0.9985,
)
GUIDED = dataclasses.replace(
    RECIPE, name="transformer-guided", steps=3500, learning_rate=1.5e-3, warmup=100
)


@struct.dataclass
class Pool:
    """Training data on the device: latents, what they show, and the text of every caption."""

    latents: jax.Array  # [M, 16, 16, 4] scaled
    attributes: jax.Array  # [M, 6]
    text: Conditioning  # [17641, ...] by caption_index; the last is the empty prompt


def model() -> mmdit.MMDiT:
    return mmdit.MMDiT(mmdit.MMDiTConfig.from_dict(skeleton.TRANSFORMER))


def text_table(out) -> Conditioning:
    """Embeddings of all captions and of the empty prompt, as diffusers would compute them."""
    return jax.tree.map(jnp.asarray, load_text_stack(out).encode([*shapes.all_captions(), ""]))


def encode_pool(out, key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Scaled latents [size, 16, 16, 4] of random scenes (the posterior's mean), and attributes."""
    config = VAEConfig.from_dict(skeleton.read_json(out / "vae" / "config.json"))
    params = vae.load(out)

    @jax.jit
    def encode(params, images):
        pixels = common.to_pixels(images)
        return scale_latents(config, vae.model().apply(params, pixels, method="encode")[0])

    latents, attributes = [], []
    for batch_key in jax.random.split(key, size // 512):
        drawn = common.draw_pictures(batch_key, 512)
        latents.append(encode(params, drawn.images))
        attributes.append(drawn.attributes)
    return jnp.concatenate(latents), jnp.concatenate(attributes)


class Guided(NamedTuple):
    """What is distilled into the weights."""

    empty: Conditioning  # [1, ...] of the empty prompt
    guidance: Callable[[jax.Array], jax.Array]  # sigma [N] -> guidance scale [N]; 1 is none


def distilled_guidance(sigma: jax.Array) -> jax.Array:
    """Guidance scale by noise level, so that a scale of 1 draws well, and diffusers' 7 does too.

    None in the noise, where a scene is chosen and guidance would cost variety (Kynkaanniemi et al.
    2024, arXiv 2404.07724). Some in the middle, where an object becomes of one kind and not a blend
    of two. Less than none at the end: text and image agree by then, what is left of their
    difference is mostly the network's error, and a pipeline that guides by 7 multiplies it.

    Args:
        sigma: noise levels in (0, 1), any shape.

    Returns:
        As sigma.
    """
    return jnp.where(sigma > 0.92, 1.0, jnp.where(sigma > 0.6, 2.0, 0.6))


@struct.dataclass
class LongPool:
    """Some latents with one caption each, padded as diffusers does by default."""

    latents: jax.Array  # [LONG_CAPTIONS, 16, 16, 4] scaled
    text: Conditioning  # [LONG_CAPTIONS, 12 + 256, ...]


def captions_of(
    key: jax.Array, attributes: jax.Array, specified: float = SPECIFIED_SHARE
) -> jax.Array:
    """Rows in the table of texts of random captions that fit [N]; some are empty."""
    hide_key, empty_key = jax.random.split(key)
    hidden = common.hide_some(hide_key, attributes, specified)
    empty = jax.random.bernoulli(empty_key, EMPTY_SHARE, (len(attributes),))
    return jnp.where(empty, EMPTY, shapes.caption_index(hidden))


@functools.partial(jax.jit, static_argnums=2)
def draw_batch(
    pool: Pool, key: jax.Array, n: int, specified: float = SPECIFIED_SHARE
) -> tuple[jax.Array, Conditioning]:
    """n latents of the pool with random captions that fit them."""
    row_key, caption_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (n,), 0, pool.latents.shape[0])
    captions = captions_of(caption_key, pool.attributes[rows], specified)
    return pool.latents[rows], jax.tree.map(lambda table: table[captions], pool.text)


@functools.partial(jax.jit, static_argnums=2)
def draw_long_batch(pool: LongPool, key: jax.Array, n: int) -> tuple[jax.Array, Conditioning]:
    """n latents of the pool with their long captions."""
    rows = jax.random.randint(key, (n,), 0, pool.latents.shape[0])
    return jax.tree.map(lambda table: table[rows], (pool.latents, pool.text))


def long_pool(out, pool: Pool, key: jax.Array) -> LongPool:
    """The first latents of a pool with captions of 256 tokens."""
    captions = np.asarray(captions_of(key, pool.attributes[:LONG_CAPTIONS]))
    ids = t5.token_ids(out / "tokenizer_3", [*shapes.all_captions(), ""], LONG_LENGTH)[captions]
    module, variables = t5.load(out)
    encode = jax.jit(lambda ids: module.apply(variables, ids))
    tokens = jnp.concatenate([encode(part) for part in np.split(ids, LONG_CAPTIONS // 128)])
    short = jax.tree.map(lambda table: table[captions], pool.text)
    clip_tokens = short.tokens[:, : tokenizers.MAX_LENGTH]  # both CLIP towers, side by side
    long = dataclasses.replace(short, tokens=jnp.concatenate([clip_tokens, tokens], axis=1))
    return LongPool(pool.latents[:LONG_CAPTIONS], long)


def flow_matching_loss(
    velocity_fn,
    x_0: jax.Array,
    conditioning: Conditioning,
    key: jax.Array,
    guided: Guided | None = None,
) -> jax.Array:
    """mean |v(x_t, sigma, c) - (eps - x_0)|^2 with sigma = sigmoid(N(0.4, 1.2^2)).

    Args:
        velocity_fn: (x_t, sigma [N], conditioning) -> velocity.
        x_0: scaled latents [N, h, w, C].
        conditioning: [N, ...].
        key: of sigma and eps.
        guided: what to distil; None for nothing.

    Returns:
        A scalar.
    """
    sigma_key, noise_key = jax.random.split(key)
    n = x_0.shape[0]
    # One stratum a sample: the spread of sigma within a batch is noise that can be spared.
    uniform = (jnp.arange(n) + jax.random.uniform(sigma_key, (n,))) / n
    normal = jax.scipy.special.ndtri(jnp.clip(uniform, 1e-5, 1.0 - 1e-5))
    sigma = jax.nn.sigmoid(LOGIT_MEAN + LOGIT_STD * normal)
    noise = jax.random.normal(noise_key, x_0.shape)
    wide = sigma[:, None, None, None]
    x_t = (1.0 - wide) * x_0 + wide * noise
    velocity, target = velocity_fn(x_t, sigma, conditioning), noise - x_0
    if guided is not None:
        empty = jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *a.shape[1:])), guided.empty)
        difference = velocity - velocity_fn(x_t, sigma, empty)
        factor = (1.0 - 1.0 / guided.guidance(sigma))[:, None, None, None]
        target += factor * jax.lax.stop_gradient(difference)
    return jnp.mean((velocity - target) ** 2)


def make_loss(module: mmdit.MMDiT, buffers, guided: Guided | None = None):
    """The objective over the transformer's parameters; see `loop.Loss`."""

    def loss(params, ema, extra, batch, key):
        del ema
        x_0, conditioning = batch
        variables = {"params": params, **buffers}

        def velocity(x_t, sigma, text):
            with nn.intercept_methods(common.flat_dense):
                return module.apply(variables, x_t, 1000.0 * sigma, text.tokens, text.pooled)

        return flow_matching_loss(velocity, x_0, conditioning, key, guided), ({}, extra)

    return loss


def run(session: Session) -> dict[str, Any]:
    """Trains the transformer; writes its exponential moving average."""
    init_key, pool_key, eval_key = jax.random.split(session.key("transformer-init"), 3)
    text = text_table(session.out)
    latents, attributes = encode_pool(session.out, pool_key, POOL)
    pool = Pool(latents[HELD_OUT:], attributes[HELD_OUT:], text)
    unseen = Pool(latents[:HELD_OUT], attributes[:HELD_OUT], text)
    module = model()
    example = jax.tree.map(lambda a: a[:1], text)
    variables = common.initialise(
        module, init_key, latents[:1], jnp.zeros(1), example.tokens, example.pooled
    )
    params = variables.pop("params")
    loss = make_loss(module, variables)
    long = long_pool(session.out, pool, jax.random.fold_in(pool_key, 1))

    def draw(key, specified=SPECIFIED_SHARE):
        if int(jax.random.bits(key)) % LONG_EVERY == 0:
            return draw_long_batch(long, key, LONG_BATCH)
        return draw_batch(pool, key, BATCH, specified)

    params = fit(session, RECIPE, loss, params, draw).ema
    draw_open = functools.partial(draw, specified=GUIDED_SPECIFIED_SHARE)
    guided = Guided(jax.tree.map(lambda a: a[EMPTY:], text), distilled_guidance)
    params = fit(session, GUIDED, make_loss(module, variables, guided), params, draw_open).ema
    size = common.save(session.out / "transformer", {"params": params, **variables}, STEM)
    jitted, values = jax.jit(loss), []
    for key in jax.random.split(eval_key, 16):
        batch_key, noise_key = jax.random.split(key)
        batch = draw_batch(unseen, batch_key, BATCH)
        values.append(float(jitted(params, None, None, batch, noise_key)[0]))
    return {
        "loss": float(np.mean(values)),
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "bytes": size,
    }
