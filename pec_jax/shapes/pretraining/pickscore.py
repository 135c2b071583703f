"""Stage `pickscore`: the contrastive encoder, fine-tuned on pairwise preferences.

A simulated crowd compares two images of one caption. What the caption names must be right; what
it leaves open is a matter of taste, and the crowd has one. The score is exp(s) cos(f, g), and the
probability that image 1 wins is softmax over the two scores (Kirstain et al. 2023, section 4;
Bradley & Terry 1952).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import clip, common
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit

Array = jax.Array

BATCH = 128  # pairs
FAITHFULNESS = 3.0  # utility of having everything right that the caption names
COLOR_TASTE = np.array([1.2, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0], np.float32)  # warm; red above all
LARGE_TASTE, LIGHT_TASTE = 0.6, 0.4
DECISIVENESS = 2.0  # P(first wins) = sigmoid(DECISIVENESS (u_1 - u_2))
WRONG_IMAGES, WRONG_ATTRIBUTES = 0.4, 0.4  # share of images that err, and of what errs in them
CONTRASTIVE_WEIGHT = 0.2
RECIPE = Recipe("pickscore", steps=800, learning_rate=3e-4, weight_decay=0.01, warmup=50)


def utility(named: Array, attributes: Array) -> Array:
    """What the crowd makes of an image: u = 3 (share of named attributes right) + look.

    Args:
        named: what the caption says [..., 5], -1 = open.
        attributes: what the image shows [..., 5].

    Returns:
        [...] in [0, 5.2]; the share is 1 where the caption names nothing.
    """
    mentioned = named >= 0
    right = jnp.sum(mentioned & (named == attributes), axis=-1)
    count = jnp.sum(mentioned, axis=-1)
    share = jnp.where(count > 0, right / jnp.maximum(count, 1), 1.0)
    look = (
        jnp.asarray(COLOR_TASTE)[attributes[..., shapes.COLOR]]
        + LARGE_TASTE * (attributes[..., shapes.SIZE] == shapes.SIZES.index("large"))
        + LIGHT_TASTE * (attributes[..., shapes.BACKGROUND] == shapes.BACKGROUNDS.index("light"))
    )
    return FAITHFULNESS * share + look


@jax.jit
def draw_attributes(key: Array, named: Array) -> Array:
    """Attributes of one image per caption: open ones at random, some of the named ones wrong."""
    keys = jax.random.split(key, 4)
    n = named.shape[0]
    attributes = shapes.fill_open(keys[0], named)
    other = shapes.fill_open(keys[1], jnp.full_like(named, shapes.OPEN))
    errs = jax.random.bernoulli(keys[2], WRONG_IMAGES, (n, 1))
    errs &= jax.random.bernoulli(keys[3], WRONG_ATTRIBUTES, named.shape)
    return jnp.where(errs, other, attributes)


@jax.jit
def render(key: Array, attributes: Array) -> Array:
    """One image [N, 32, 32, 3] for each row of attributes [N, 5]."""
    return shapes.render(shapes.sample_scene(key, attributes))


def draw_pairs(key: Array, n: int) -> dict[str, Array]:
    """Captions, two images of each, and the share of the crowd that prefers the first.

    Args:
        key: PRNG key.
        n: how many pairs.

    Returns:
        captions [n], images [2, n, 32, 32, 3] in [0, 1], utilities [2, n], preference [n], and
        own [n, 32, 32, 3], faithful images, for the contrastive loss.
    """
    keys = jax.random.split(key, 9)
    own, attributes = common.draw_images(keys[0], n)
    named = common.hide_some(keys[1], attributes, 0.1)
    pair = [draw_attributes(keys[2 + i], named) for i in range(2)]
    images = [common.augment(keys[4 + i], render(keys[6 + i], pair[i])) for i in range(2)]
    utilities = jnp.stack([utility(named, shown) for shown in pair])
    return {
        "captions": shapes.caption_index(named),
        "images": jnp.stack(images),
        "own": common.augment(keys[8], own),
        "utilities": utilities,
        "preference": jax.nn.sigmoid(DECISIVENESS * (utilities[0] - utilities[1])),
    }


def scores(module, params, ids: Array, images: Array) -> tuple[Array, Array, Array]:
    """PickScore's scores exp(s) cos(f, g) of two images per caption.

    Args:
        module: the CLIPModel.
        params: its parameters.
        ids: token ids [N, L].
        images: [2, N, 32, 32, 3] in [0, 1].

    Returns:
        scores [2, N], unit text features [N, d], unit image features [2, N, d].
    """
    pixels = common.to_pixels(images.reshape(-1, *images.shape[2:]))
    text, image = module.apply({"params": params}, ids, pixels)
    text = common.normalise(text)
    image = common.normalise(image).reshape(2, *text.shape)
    scale = jnp.exp(jnp.minimum(params["logit_scale"], clip.MAX_LOG_SCALE))
    return scale * jnp.sum(image * text, axis=-1), text, image


def preference_loss(pair_scores: Array, preference: Array) -> Array:
    """Cross-entropy between softmax(scores) over the two images and the crowd's shares.

    Args:
        pair_scores: [2, N].
        preference: share that prefers the first image [N], in [0, 1].

    Returns:
        A scalar, nats.
    """
    targets = jnp.stack([preference, 1.0 - preference], axis=-1)
    return jnp.mean(optax.softmax_cross_entropy(pair_scores.T, targets))


def make_loss(module):
    """Preference loss plus a little of the contrastive one; see `loop.Loss`."""

    def loss(params, ema, extra, batch, key):
        del ema, key
        pair_scores, text, _ = scores(module, params, batch["ids"], batch["images"])
        preferred = preference_loss(pair_scores, batch["preference"])
        scale = jnp.exp(jnp.minimum(params["logit_scale"], clip.MAX_LOG_SCALE))
        own = module.apply(
            {"params": params}, common.to_pixels(batch["own"]), method="get_image_features"
        )
        contrastive = clip.contrastive_loss(common.normalise(own), text, scale, batch["captions"])
        agree = (pair_scores[0] > pair_scores[1]) == (batch["preference"] > 0.5)
        metrics = {"preference": preferred, "agreement": jnp.mean(agree), "scale": scale}
        return preferred + CONTRASTIVE_WEIGHT * contrastive, (metrics, extra)

    return loss


def evaluate(module, params, ids: np.ndarray, key: Array) -> dict[str, float]:
    """Agreement with the simulated crowd on new pairs.

    Returns:
        `pair_accuracy`: agreement with single raters' choices; `pair_accuracy_best`: that of the
        true utility, which no score can beat; `order_accuracy`: pairs put in the order of their
        utilities, of those whose utilities differ; `loss`; `look_correlation`: Pearson correlation
        of score and utility over images of the caption that names nothing.
    """
    pair_key, choice_key, look_key = jax.random.split(key, 3)
    batch = draw_pairs(pair_key, 2048)
    rows = np.asarray(batch["captions"])
    jitted = jax.jit(lambda p, i, x: scores(module, p, i, x)[0])
    found = jitted(params, jnp.asarray(ids)[rows], batch["images"])
    first = np.asarray(jax.random.bernoulli(choice_key, batch["preference"]))
    mine, true = np.asarray(found[0] > found[1]), np.asarray(batch["preference"] > 0.5)
    different = np.abs(np.asarray(batch["utilities"][0] - batch["utilities"][1])) > 1e-6

    images, attributes = common.draw_images(look_key, 1024)
    nothing = jnp.full_like(attributes, shapes.OPEN)
    open_ids = jnp.asarray(ids)[np.asarray(shapes.caption_index(nothing))][:512]
    looks = np.asarray(jitted(params, open_ids, images.reshape(2, 512, *images.shape[1:])))
    taste = np.asarray(utility(nothing, attributes))
    return {
        "loss": float(preference_loss(found, batch["preference"])),
        "pair_accuracy": float(np.mean(mine == first)),
        "pair_accuracy_best": float(np.mean(true == first)),
        "order_accuracy": float(np.mean((mine == true)[different])),
        "look_correlation": float(np.corrcoef(looks.reshape(-1), taste)[0, 1]),
    }


def run(session: Session) -> dict[str, Any]:
    """Fine-tunes the contrastive encoder; writes encoders/pickscore."""
    directory = session.out / "encoders" / "pickscore"
    module, ids = clip.model(directory), clip.caption_ids(directory)
    pixels = jnp.zeros((1, 32, 32, 3))
    start = common.load(session.out / "encoders" / "clip", module, clip.STEM, ids[:1], pixels)

    def draw(key):
        batch = draw_pairs(key, BATCH)
        return batch | {"ids": ids[np.asarray(batch["captions"])]}

    params = fit(session, RECIPE, make_loss(module), start["params"], draw).ema
    size = common.save(directory, {"params": params}, clip.STEM)
    numbers = evaluate(module, params, ids, session.key("pickscore-eval"))
    return numbers | {"logit_scale": float(np.exp(params["logit_scale"])), "bytes": size}
