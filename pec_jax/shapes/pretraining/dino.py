"""Stage `dino`: a vision transformer by self-distillation, without captions or labels.

A student sees every crop, a teacher (the student's moving average) only the large ones; the
student learns the teacher's output on the other crops (Caron et al. 2021, algorithm 1). The
teacher's outputs are centred by Sinkhorn-Knopp, which gives every prototype its equal share of
each batch (Caron et al. 2020, section 3.1; used so in DINOv2): a running mean let these small
networks collapse to two clusters, light and dark. Colours are jittered but weakly, so that the
features keep them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models import vit
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import common, skeleton
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit

Array = jax.Array

BATCH = 96
GLOBAL_CROPS, LOCAL_CROPS = 2, 2
GLOBAL_AREA, LOCAL_AREA = (0.7, 1.0), (0.4, 0.7)  # share of the image
PROTOTYPES, BOTTLENECK = 128, 64
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.06
SINKHORN_ROUNDS = 3
NEIGHBOURS = 10
RECIPE = Recipe(
    "dino", steps=1000, learning_rate=1e-3, weight_decay=0.04, warmup=150, ema_decay=0.99
)


def model() -> vit.ViTModel:
    return vit.ViTModel(vit.ViTConfig.from_dict(skeleton.VIT))


def random_crops(key: Array, images: Array, area: tuple[float, float]) -> Array:
    """Random square crops, resized back by bilinear interpolation.

    Args:
        key: PRNG key.
        images: [N, S, S, 3].
        area: smallest and largest share of the image that a crop covers.

    Returns:
        [N, S, S, 3].
    """
    area_key, place_key = jax.random.split(key)
    n, size = images.shape[:2]
    share = jax.random.uniform(area_key, (n, 1), minval=area[0], maxval=area[1])
    side = jnp.sqrt(share)  # [N, 1] of the image's
    start = jax.random.uniform(place_key, (n, 2)) * (1.0 - side)
    centers = (jnp.arange(size) + 0.5) / size
    # Where each output pixel lies in the input, in pixels; [N, 2 axes, S].
    places = (start[..., None] + side[..., None] * centers) * size - 0.5
    places = jnp.clip(places, 0.0, size - 1.0)
    weights = jnp.maximum(1.0 - jnp.abs(places[..., None] - jnp.arange(size)), 0.0)
    rows = jnp.einsum("nij,njwc->niwc", weights[:, 0], images)
    return jnp.einsum("nij,nhjc->nhic", weights[:, 1], rows)


crop_jitted = jax.jit(random_crops, static_argnums=2)


def initial_head(key: Array, width: int, prototypes: int = PROTOTYPES) -> dict[str, Array]:
    """The projection head: two layers, a bottleneck on the sphere, unit prototypes."""
    keys = jax.random.split(key, 3)
    hidden = 2 * width
    return {
        "fc1": jax.random.normal(keys[0], (width, hidden)) * width**-0.5,
        "bias1": jnp.zeros(hidden),
        "fc2": jax.random.normal(keys[1], (hidden, BOTTLENECK)) * hidden**-0.5,
        "prototypes": jax.random.normal(keys[2], (BOTTLENECK, prototypes)),
    }


def apply_head(head: dict[str, Array], features: Array) -> Array:
    """Class-token features [N, D] -> logits over prototypes [N, PROTOTYPES], in [-1, 1]."""
    x = jax.nn.gelu(features @ head["fc1"] + head["bias1"])
    return common.normalise(x @ head["fc2"]) @ common.normalise(head["prototypes"].T).T


def sinkhorn(logits: Array) -> Array:
    """Soft assignments that use every prototype equally: rows sum to 1, columns to N / K.

    Alternating normalisation of Q = exp(logits / tau_t).

    Args:
        logits: the teacher's [N, K].

    Returns:
        [N, K], rows summing to 1.

    Source: Cuturi 2013; Caron et al. 2020, equation 4.
    """
    log_q = logits / TEACHER_TEMPERATURE
    for _ in range(SINKHORN_ROUNDS):
        log_q -= jax.scipy.special.logsumexp(log_q, axis=0, keepdims=True)
        log_q -= jax.scipy.special.logsumexp(log_q, axis=1, keepdims=True)
    return jnp.exp(log_q)


def distillation_loss(student: Array, targets: Array) -> Array:
    """Cross-entropy of the student under the teacher over all pairs of different crops.

    L = mean over s != t of -sum_k q_tk log softmax(g_s / tau_s)_k

    Args:
        student: logits of all crops [C, N, K], the large ones first.
        targets: the teacher's assignments q of the large crops [G, N, K].

    Returns:
        A scalar, nats.
    """
    log_probs = jax.nn.log_softmax(student / STUDENT_TEMPERATURE, axis=-1)
    nats = -jnp.einsum("gnk,snk->gs", targets, log_probs) / student.shape[1]
    different = 1.0 - jnp.eye(targets.shape[0], student.shape[0])
    return jnp.sum(nats * different) / jnp.sum(different)


def draw(key: Array) -> Array:
    """Crops of new images [C, N, 32, 32, 3] in [-1, 1], the large ones first."""
    image_key, *keys = jax.random.split(key, 1 + GLOBAL_CROPS + LOCAL_CROPS)
    images = common.draw_images(image_key, BATCH)[0]
    crops = []
    for i, crop_key in enumerate(keys):
        area = GLOBAL_AREA if i < GLOBAL_CROPS else LOCAL_AREA
        crop_key, augment_key = jax.random.split(crop_key)
        crops.append(common.augment(augment_key, crop_jitted(crop_key, images, area)))
    return common.to_pixels(jnp.stack(crops))


def make_loss(module: vit.ViTModel):
    """DINO's objective; `ema` is the teacher; see `loop.Loss`."""

    def loss(params, ema, extra, crops, key):
        del key

        def logits(variables, pixels):
            flat = pixels.reshape(-1, *pixels.shape[2:])
            features = module.apply({"params": variables["vit"]}, flat)[:, 0]
            return apply_head(variables["head"], features).reshape(*pixels.shape[:2], -1)

        teacher = logits(ema, crops[:GLOBAL_CROPS])
        assigned = sinkhorn(teacher.reshape(-1, teacher.shape[-1])).reshape(teacher.shape)
        targets = jax.lax.stop_gradient(assigned)
        mean = jnp.mean(targets, axis=(0, 1))
        metrics = {
            # Collapse shows as a marginal entropy near 0, or as targets as flat as the marginal.
            "marginal_entropy": -jnp.sum(mean * jnp.log(mean + 1e-9)),
            "target_entropy": -jnp.mean(jnp.sum(targets * jnp.log(targets + 1e-9), axis=-1)),
        }
        return distillation_loss(logits(params, crops), targets), (metrics, extra)

    return loss


def knn_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Majority label of the nearest neighbours by cosine: [N, d], [N], [M, d] -> [M]."""
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (train, test)]
    nearest = np.argsort(-(unit[1] @ unit[0].T), axis=-1)[:, :NEIGHBOURS]
    votes = labels[nearest]  # [M, k]
    return np.array([np.bincount(v).argmax() for v in votes])


def evaluate(params, key: Array) -> dict[str, float]:
    """Spread of the features and kNN accuracy of each attribute on new images."""
    images, attributes = common.draw_images(key, 3072)

    @jax.jit
    def class_token(params, pixels):
        tokens: Any = model().apply({"params": params}, pixels)
        return tokens[:, 0]

    features = np.asarray(class_token(params, common.to_pixels(images)))
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    numbers = {"unit_feature_variance": float(unit.var(axis=0).sum())}
    values = np.linalg.eigvalsh(np.cov(unit.T))
    numbers["effective_dimensions"] = float(values.sum() ** 2 / (values**2).sum())
    truth = np.asarray(attributes)
    for i, name in enumerate(shapes.ATTRIBUTES):
        found = knn_accuracy(features[:2048], truth[:2048, i], features[2048:])
        numbers[f"knn/{name}"] = float(np.mean(found == truth[2048:, i]))
    return numbers


def run(session: Session) -> dict[str, Any]:
    """Trains student and teacher; writes the teacher to encoders/dino."""
    init_key, head_key, eval_key = jax.random.split(session.key("dino-init"), 3)
    params = {
        "vit": common.spread_positions(
            common.initialise(model(), init_key, jnp.zeros((1, 32, 32, 3)))["params"]
        ),
        "head": initial_head(head_key, skeleton.VIT["hidden_size"]),
    }
    teacher = fit(session, RECIPE, make_loss(model()), params, draw).ema["vit"]
    size = common.save(session.out / "encoders" / "dino", {"params": teacher}, "model")
    return evaluate(teacher, eval_key) | {"bytes": size}
