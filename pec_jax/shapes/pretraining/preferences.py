"""Contrastive encoders fine-tuned on the choices of a crowd: PickScore and its like.

Two pictures of one caption are shown to the raters of `crowd`. The score is exp(s) cos(f, g), and
the probability that picture 1 wins is softmax over the two scores (Kirstain et al. 2023, section 4;
Bradley & Terry 1952). Three such models differ in whom they asked, and two in what they are:
`pickscore` and `pickscore_taste` start from the contrastive encoder, `hps` learns from nothing,
with another architecture, from other pictures and other raters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pec_jax.shapes import crowd as crowds
from pec_jax.shapes import finish
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.crowd import Crowd
from pec_jax.shapes.pretraining import clip, common
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit

Array = jax.Array

BATCH = 64  # pairs
WRONG_IMAGES, WRONG_ATTRIBUTES = 0.4, 0.4  # share of images that err, and of what errs in them
CONTRASTIVE_WEIGHT = 0.2
BETTER = 0.5  # share of pictures better made than the web's, up to perfect


@dataclasses.dataclass(frozen=True)
class Study:
    """One preference model: whom it asks, and how it is trained."""

    recipe: Recipe
    raters: int | None  # seed of the crowd's sample; None is the crowd of taste alone
    start: str = ""  # the encoder it starts from; '' is from nothing

    @property
    def name(self) -> str:
        return self.recipe.name

    def crowd(self) -> Crowd:
        if self.raters is None:
            return crowds.taste_only()
        return crowds.sample(jax.random.key(self.raters))


def _fine_tuned(name: str) -> Recipe:
    return Recipe(name, steps=1000, learning_rate=3e-4, weight_decay=0.01, warmup=50)


PICKSCORE = Study(_fine_tuned("pickscore"), raters=1, start="clip")
TASTE = Study(_fine_tuned("pickscore_taste"), raters=None, start="clip")
HPS = Study(Recipe("hps", steps=3000, learning_rate=1e-3, weight_decay=0.05, warmup=100), raters=2)
STUDIES = {study.name: study for study in (PICKSCORE, TASTE, HPS)}


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
def draw_defects(key: Array, like: Array) -> Array:
    """Defects of one picture for each row: the web's, or fewer, as a trained model would draw."""
    web_key, better_key, factor_key = jax.random.split(key, 3)
    web = finish.draw_defects(web_key, len(like))
    better = jax.random.bernoulli(better_key, BETTER, (len(like), 1))
    return web * jnp.where(better, jax.random.uniform(factor_key, (len(like), 1)), 1.0)


def draw_pairs(crowd: Crowd, key: Array, n: int) -> dict[str, Array]:
    """Captions, two images of each, and the share of the crowd that prefers the first.

    Args:
        crowd: whom to ask.
        key: PRNG key.
        n: how many pairs.

    Returns:
        captions [n], images [2, n, 64, 64, 3] in [0, 1], utilities [2, n] of the mean rater,
        preference [n], and own [n, 64, 64, 3], faithful images, for the contrastive loss.
    """
    keys = jax.random.split(key, 11)
    own = common.draw_pictures(keys[0], n)
    named = common.hide_some(keys[1], own.attributes, 0.1)
    shown = [draw_attributes(keys[2 + i], named) for i in range(2)]
    defects = [draw_defects(keys[4 + i], named) for i in range(2)]
    pictures = [common.take(keys[6 + i], shown[i], defects[i]) for i in range(2)]
    images = [common.augment(keys[8 + i], pictures[i]) for i in range(2)]
    asked = [_utilities(crowd, named, *seen) for seen in zip(shown, defects)]
    return {
        "captions": shapes.caption_index(named),
        "images": jnp.stack(images),
        "own": common.augment(keys[10], own.images),
        "utilities": jnp.stack([jnp.mean(u, axis=0) for u in asked]),
        "preference": crowds.preference(*asked),
    }


_utilities = jax.jit(crowds.utilities)


def scores(module, params, ids: Array, images: Array) -> tuple[Array, Array, Array]:
    """PickScore's scores exp(s) cos(f, g) of two images per caption.

    Args:
        module: the CLIPModel.
        params: its parameters.
        ids: token ids [N, L].
        images: [2, N, 64, 64, 3] in [0, 1].

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


def evaluate(module, params, crowd: Crowd, ids: np.ndarray, key: Array) -> dict[str, float]:
    """Agreement with the crowd on new pairs.

    Returns:
        `pair_accuracy`: agreement with single raters' choices; `pair_accuracy_best`: that of the
        true shares, which no score can beat; `order_accuracy`: pairs put in the order of their
        mean utilities; `utility_correlation`: Pearson correlation of score and mean utility over
        pictures of the caption that names nothing; `loss`.
    """
    pair_key, choice_key, open_key, defect_key, picture_key = jax.random.split(key, 5)
    batch = draw_pairs(crowd, pair_key, 2048)
    rows = np.asarray(batch["captions"])
    jitted = jax.jit(lambda p, i, x: scores(module, p, i, x)[0])
    found = jitted(params, jnp.asarray(ids)[rows], batch["images"])
    first = np.asarray(jax.random.bernoulli(choice_key, batch["preference"]))
    mine, true = np.asarray(found[0] > found[1]), np.asarray(batch["preference"] > 0.5)
    utilities = np.asarray(batch["utilities"])
    order = utilities[0] > utilities[1]

    nothing = jnp.full((1024, len(shapes.ATTRIBUTES)), shapes.OPEN, jnp.int32)
    attributes = shapes.fill_open(open_key, nothing)
    defects = draw_defects(defect_key, nothing)
    images = common.take(picture_key, attributes, defects)
    open_ids = jnp.asarray(ids)[np.asarray(shapes.caption_index(nothing))][:512]
    looks = np.asarray(jitted(params, open_ids, images.reshape(2, 512, *images.shape[1:])))
    truth = np.asarray(jnp.mean(crowds.utilities(crowd, nothing, attributes, defects), axis=0))
    return {
        "loss": float(preference_loss(found, batch["preference"])),
        "pair_accuracy": float(np.mean(mine == first)),
        "pair_accuracy_best": float(np.mean(true == first)),
        "order_accuracy": float(np.mean(mine == order)),
        "utility_correlation": float(np.corrcoef(looks.reshape(-1), truth)[0, 1]),
    }


def run(session: Session, name: str) -> dict[str, Any]:
    """Trains the preference model of that name, one of STUDIES; writes encoders/NAME."""
    study = STUDIES[name]
    directory = session.out / "encoders" / study.name
    module, ids = clip.model(directory), clip.caption_ids(directory)
    pixels = jnp.zeros((1, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3))
    if study.start:
        source = session.out / "encoders" / study.start
        params = common.load(source, module, clip.STEM, ids[:1], pixels)["params"]
    else:
        variables = common.initialise(module, session.key(f"{study.name}-init"), ids[:1], pixels)
        params = common.spread_positions(variables["params"])
    crowd = study.crowd()

    def draw(key):
        batch = draw_pairs(crowd, key, BATCH)
        return batch | {"ids": ids[np.asarray(batch["captions"])]}

    params = fit(session, study.recipe, make_loss(module), params, draw).ema
    size = common.save(directory, {"params": params}, clip.STEM)
    numbers = evaluate(module, params, crowd, ids, session.key(f"{study.name}-eval"))
    return numbers | {"logit_scale": float(np.exp(params["logit_scale"])), "bytes": size}
