"""Stage `dino`: a vision transformer by self-distillation, without captions or labels.

A student sees every crop, a teacher (the student's moving average) only the large ones; the
student learns the teacher's output on the other crops (Caron et al. 2021, algorithm 1). The
teacher's outputs are centred by Sinkhorn-Knopp, which gives every prototype its equal share of
each batch (Caron et al. 2020, section 3.1; used so in DINOv2): a running mean let these small
networks collapse to two clusters, light and dark. As there, brightness, contrast, blur and noise
are augmentations: every crop of a picture is developed anew. Hue is not, so that the features keep
colours.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models import vit
from pec_jax.shapes.pretraining import common as base
from pec_jax.shapes.pretraining import dino as stage
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit
from pec_jax.world import finish, render
from pec_jax.world import scenes as shapes
from pec_jax.world.pretraining import common, skeleton

Array = jax.Array

BATCH = 96
GLOBAL_AREA, LOCAL_AREA = (0.8, 1.0), (0.5, 0.8)  # share of the image
PROTOTYPES = 1024
REFERENCES = 16384  # images whose labels the neighbours give
RECIPE = Recipe(
    "dino", steps=2500, learning_rate=1e-3, weight_decay=0.04, warmup=150, ema_decay=0.99
)


def model() -> vit.ViTModel:
    return vit.ViTModel(vit.ViTConfig.from_dict(skeleton.VIT))


@jax.jit
def sharp(key: Array) -> Array:
    """Sharp pictures [N, 64, 64, 3], each crooked as on the web."""
    scene_key, defect_key, sign_key = jax.random.split(key, 3)
    nothing = jnp.full((BATCH, len(shapes.ATTRIBUTES)), shapes.OPEN, jnp.int32)
    defects = finish.draw_defects(defect_key, BATCH)
    scene = shapes.sample_scene(scene_key, nothing)
    return render.draw(scene, finish.from_defects(sign_key, defects).tilt)


@jax.jit
def developed(key: Array, images: Array) -> Array:
    """The same pictures with defects drawn anew."""
    defect_key, sign_key, grain_key = jax.random.split(key, 3)
    defects = finish.draw_defects(defect_key, images.shape[0])
    return finish.develop(grain_key, images, finish.from_defects(sign_key, defects))


def draw(key: Array) -> Array:
    """Crops of new images [C, N, 64, 64, 3] in [-1, 1], the large ones first."""
    image_key, *keys = jax.random.split(key, 1 + stage.GLOBAL_CROPS + stage.LOCAL_CROPS)
    images = sharp(image_key)
    crops = []
    for i, crop_key in enumerate(keys):
        area = GLOBAL_AREA if i < stage.GLOBAL_CROPS else LOCAL_AREA
        crop_key, develop_key = jax.random.split(crop_key)
        crops.append(stage.crop_jitted(crop_key, developed(develop_key, images), area))
    return base.to_pixels(jnp.stack(crops))


def evaluate(params, key: Array) -> dict[str, float]:
    """Spread of the features and kNN accuracy of each attribute on new images."""
    drawn = [common.draw_pictures(k, 1024) for k in jax.random.split(key, 1 + REFERENCES // 1024)]

    @jax.jit
    def class_token(params, pixels):
        tokens: Any = model().apply({"params": params}, pixels)
        return tokens[:, 0]

    features = np.concatenate(
        [np.asarray(class_token(params, base.to_pixels(part.images))) for part in drawn]
    )
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    numbers = {"unit_feature_variance": float(unit.var(axis=0).sum())}
    values = np.linalg.eigvalsh(np.cov(unit.T))
    numbers["effective_dimensions"] = float(values.sum() ** 2 / (values**2).sum())
    truth = np.concatenate([np.asarray(part.attributes) for part in drawn])
    for i, name in enumerate(shapes.ATTRIBUTES):
        found = stage.knn_accuracy(features[1024:], truth[1024:, i], features[:1024])
        numbers[f"knn/{name}"] = float(np.mean(found == truth[:1024, i]))
    return numbers


def run(session: Session) -> dict[str, Any]:
    """Trains student and teacher; writes the teacher to encoders/dino."""
    init_key, head_key, eval_key = jax.random.split(session.key("dino-init"), 3)
    params = {
        "vit": base.spread_positions(
            base.initialise(model(), init_key, jnp.zeros((1, 64, 64, 3)))["params"]
        ),
        "head": stage.initial_head(head_key, skeleton.VIT["hidden_size"], PROTOTYPES),
    }
    teacher = fit(session, RECIPE, stage.make_loss(model()), params, draw).ema["vit"]
    size = base.save(session.out / "encoders" / "dino", {"params": teacher}, "model")
    return evaluate(teacher, eval_key) | {"bytes": size}
