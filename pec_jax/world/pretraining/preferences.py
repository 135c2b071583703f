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

from pec_jax.shapes.pretraining import clip as clip_stage
from pec_jax.shapes.pretraining import common as base
from pec_jax.shapes.pretraining import pickscore
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit
from pec_jax.world import crowd as crowds
from pec_jax.world import finish
from pec_jax.world import scenes as shapes
from pec_jax.world.crowd import Crowd
from pec_jax.world.pretraining import clip, common

Array = jax.Array

BATCH = 128  # pairs
WRONG_IMAGES, WRONG_ATTRIBUTES = 0.4, 0.4  # share of images that err, and of what errs in them
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
    return Recipe(name, steps=1500, learning_rate=3e-4, weight_decay=0.01, warmup=50)


PICKSCORE = Study(_fine_tuned("pickscore"), raters=1, start="clip")
TASTE = Study(_fine_tuned("pickscore_taste"), raters=None, start="clip")
HPS = Study(Recipe("hps", steps=4000, learning_rate=1e-3, weight_decay=0.05, warmup=100), raters=2)


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
    named = base.hide_some(keys[1], own.attributes, 0.1)
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
    jitted = jax.jit(lambda p, i, x: pickscore.scores(module, p, i, x)[0])
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
        "loss": float(pickscore.preference_loss(found, batch["preference"])),
        "pair_accuracy": float(np.mean(mine == first)),
        "pair_accuracy_best": float(np.mean(true == first)),
        "order_accuracy": float(np.mean(mine == order)),
        "utility_correlation": float(np.corrcoef(looks.reshape(-1), truth)[0, 1]),
    }


def train(session: Session, study: Study) -> dict[str, Any]:
    """Trains one preference model; writes encoders/NAME."""
    directory = session.out / "encoders" / study.name
    module, ids = clip_stage.model(directory), clip.caption_ids(directory)
    pixels = jnp.zeros((1, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3))
    if study.start:
        source = session.out / "encoders" / study.start
        params = base.load(source, module, clip.STEM, ids[:1], pixels)["params"]
    else:
        variables = base.initialise(module, session.key(f"{study.name}-init"), ids[:1], pixels)
        params = base.spread_positions(variables["params"])
    crowd = study.crowd()

    def draw(key):
        batch = draw_pairs(crowd, key, BATCH)
        return batch | {"ids": ids[np.asarray(batch["captions"])]}

    params = fit(session, study.recipe, pickscore.make_loss(module), params, draw).ema
    size = base.save(directory, {"params": params}, clip.STEM)
    numbers = evaluate(module, params, crowd, ids, session.key(f"{study.name}-eval"))
    return numbers | {"logit_scale": float(np.exp(params["logit_scale"])), "bytes": size}
