"""Stage `dino`: a vision transformer that sees no captions, and is told of no attribute.

Two photographs are taken of every scene, moments apart: things have moved a little, the light has
changed a little, and each photograph has its own finish. A student sees one, a teacher (the
student's moving average) the other, and the student learns which of the teacher's photographs shows
its scene (Chen et al. 2021, MoCo v3, algorithm 1, without its heads). So the features keep what
makes a scene, and drop focus, noise, contrast, exposure, tilt and small shifts.

The architecture is DINO's, the objective is not: self-distillation over prototypes (Caron et al.
2021) learned colours and backgrounds and hardly more in the steps that a laptop has.

The other pictures are those of an album: all fit one caption, as the images of a prompt do when the
entropy of their features is taken, so that what tells them apart is what that caption leaves open.
In batches of all scenes, colours and backgrounds suffice. There is no projection head, so that the
cosine of two class tokens is what is trained: behind a head they need not keep what is small.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models.vision import VisionTower
from pec_jax.models.vision_kinds import read_vision_config
from pec_jax.shapes import finish
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import common, skeleton
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit

Array = jax.Array

ALBUMS, ALBUM = 2, 48  # albums of a batch, and scenes of an album
LEAST_OPEN = 0.3  # least probability of an attribute to be open in an album's caption
TEMPERATURE = 0.1
NEIGHBOURS = 10
REFERENCES = 32768  # images whose labels the neighbours give
RECIPE = Recipe(
    "dino", steps=4000, learning_rate=2e-3, weight_decay=0.04, warmup=100, ema_decay=0.99
)


def model() -> VisionTower:
    return VisionTower(read_vision_config(skeleton.VIT))


def contrastive_loss(student: Array, teacher: Array) -> Array:
    """InfoNCE within albums: which of the teacher's photographs shows the student's scene?

    L = -mean_i log softmax_j(cos(s_i, t_j) / TEMPERATURE)_i

    Args:
        student: features of photographs [A, N, d], of N scenes in each of A albums.
        teacher: of the other photograph of each scene, [A, N, d]; no gradient flows to it.

    Returns:
        A scalar, nats.
    """
    teacher = jax.lax.stop_gradient(common.normalise(teacher))
    cosines = jnp.einsum("aid,ajd->aij", common.normalise(student), teacher)
    log_probs = jax.nn.log_softmax(cosines / TEMPERATURE, axis=-1)
    return -jnp.mean(jnp.diagonal(log_probs, axis1=-2, axis2=-1))


@jax.jit
def album(key: Array) -> Array:
    """Attributes [ALBUM, 6] of scenes that all fit one random caption."""
    scene_key, share_key, hide_key, fill_key = jax.random.split(key, 4)
    one = shapes.fill_open(scene_key, jnp.full((1, len(shapes.ATTRIBUTES)), shapes.OPEN))
    share = jax.random.uniform(share_key, (1, 1), minval=LEAST_OPEN)
    named = shapes.hide(hide_key, one, share)
    return shapes.fill_open(fill_key, jnp.tile(named, (ALBUM, 1)))


@jax.jit
def photograph(key: Array, attributes: Array) -> Array:
    """Pictures [N, 64, 64, 3] in [0, 1] of scenes, with the finish of the web."""
    defect_key, picture_key = jax.random.split(key)
    return common.take(picture_key, attributes, finish.draw_defects(defect_key, len(attributes)))


def draw(key: Array) -> Array:
    """Two photographs of each scene, [2, ALBUMS * ALBUM, 64, 64, 3] in [-1, 1]."""
    album_key, *photo_keys = jax.random.split(key, 3)
    attributes = jnp.concatenate([album(k) for k in jax.random.split(album_key, ALBUMS)])
    return common.to_pixels(jnp.stack([photograph(k, attributes) for k in photo_keys]))


def make_loss(module: VisionTower):
    """Momentum contrast of the two photographs, each way; `ema` is the teacher; see `loop.Loss`."""

    def loss(params, ema, extra, photographs, key):
        del key

        def features(params):
            pixels = photographs.reshape(-1, *photographs.shape[2:])
            found: Any = module.apply({"params": params}, pixels)
            return found.reshape(2, ALBUMS, ALBUM, -1)

        student, teacher = features(params), features(ema)
        there = contrastive_loss(student[0], teacher[1])
        back = contrastive_loss(student[1], teacher[0])
        return 0.5 * (there + back), ({}, extra)

    return loss


def knn_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Majority label of the nearest neighbours by cosine: [N, d], [N], [M, d] -> [M]."""
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (train, test)]
    nearest = np.argsort(-(unit[1] @ unit[0].T), axis=-1)[:, :NEIGHBOURS]
    votes = labels[nearest]  # [M, k]
    return np.array([np.bincount(v).argmax() for v in votes])


def evaluate(params, key: Array) -> dict[str, float]:
    """Spread of the features and kNN accuracy of each attribute on new images."""
    drawn = [common.draw_pictures(k, 1024) for k in jax.random.split(key, 1 + REFERENCES // 1024)]

    @jax.jit
    def class_token(params, pixels):
        return model().apply({"params": params}, pixels)

    features = np.concatenate(
        [np.asarray(class_token(params, common.to_pixels(part.images))) for part in drawn]
    )
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    numbers = {"unit_feature_variance": float(unit.var(axis=0).sum())}
    values = np.linalg.eigvalsh(np.cov(unit.T))
    numbers["effective_dimensions"] = float(values.sum() ** 2 / (values**2).sum())
    truth = np.concatenate([np.asarray(part.attributes) for part in drawn])
    for i, name in enumerate(shapes.ATTRIBUTES):
        found = knn_accuracy(features[1024:], truth[1024:, i], features[:1024])
        numbers[f"knn/{name}"] = float(np.mean(found == truth[:1024, i]))
    return numbers


def run(session: Session) -> dict[str, Any]:
    """Trains the student; writes its moving average to encoders/dino."""
    init_key, eval_key = jax.random.split(session.key("dino-init"))
    pixels = jnp.zeros((1, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3))
    params = common.spread_positions(common.initialise(model(), init_key, pixels)["params"])
    teacher = fit(session, RECIPE, make_loss(model()), params, draw).ema
    size = common.save(session.out / "encoders" / "dino", {"params": teacher}, "model")
    return evaluate(teacher, eval_key) | {"bytes": size}
