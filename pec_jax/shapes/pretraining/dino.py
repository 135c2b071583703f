"""Stage `dino`: a vision transformer by self-distillation; it never sees a caption or a label.

Two photographs are taken of every scene, each with its own finish. A student sees each with a part
of its patches hidden, a teacher (the student's moving average) sees them whole; from one photograph
the student learns what the teacher says of the other (Caron et al. 2021, algorithm 1; Assran et al.
2022, section 3, for hidden patches in place of crops, after which sizes and places would not
matter). So the features keep the scene, and drop focus, noise, contrast, exposure and tilt.

The teacher's outputs are centred by Sinkhorn-Knopp, which gives every prototype its equal share
(Caron et al. 2020, section 3.1; used so in DINOv2): a running mean let these small networks
collapse to two clusters, light and dark. The share is that of an album: all its pictures fit one
caption, as the images of a prompt do when the entropy of their features is taken, so that what
tells them apart is what that caption leaves open. In batches of all scenes, colours and backgrounds
suffice, and nothing else is learned.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models import vit
from pec_jax.shapes import finish, render
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import common, skeleton
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit

Array = jax.Array

ALBUMS, ALBUM = 2, 48  # albums of a batch, and scenes of an album
LEAST_OPEN = 0.3  # least probability of an attribute to be open in an album's caption
HIDDEN_SHARE = 0.6  # largest share of a photograph's patches that the student does not see
PROTOTYPES, BOTTLENECK = 512, 64
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.06
SINKHORN_ROUNDS = 3
NEIGHBOURS = 10
REFERENCES = 16384  # images whose labels the neighbours give
RECIPE = Recipe(
    "dino", steps=2500, learning_rate=1e-3, weight_decay=0.04, warmup=150, ema_decay=0.99
)


def model() -> vit.ViTModel:
    return vit.ViTModel(vit.ViTConfig.from_dict(skeleton.VIT))


def initial_head(key: Array, width: int) -> dict[str, Array]:
    """The projection head: two layers, a bottleneck on the sphere, unit prototypes."""
    keys = jax.random.split(key, 3)
    hidden = 2 * width
    return {
        "fc1": jax.random.normal(keys[0], (width, hidden)) * width**-0.5,
        "bias1": jnp.zeros(hidden),
        "fc2": jax.random.normal(keys[1], (hidden, BOTTLENECK)) * hidden**-0.5,
        "prototypes": jax.random.normal(keys[2], (BOTTLENECK, PROTOTYPES)),
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
    """Cross-entropy of the student under the teacher, each of the other photograph.

    L = -mean over photographs s != t of sum_k q_tk log softmax(g_s / tau_s)_k

    Args:
        student: logits [2, N, K].
        targets: the teacher's assignments q [2, N, K].

    Returns:
        A scalar, nats.
    """
    log_probs = jax.nn.log_softmax(student / STUDENT_TEMPERATURE, axis=-1)
    return -jnp.mean(jnp.sum(targets[::-1] * log_probs, axis=-1))


@jax.jit
def album(key: Array) -> shapes.Scene:
    """Scenes that all fit one random caption."""
    scene_key, share_key, hide_key, sample_key = jax.random.split(key, 4)
    one = shapes.fill_open(scene_key, jnp.full((1, len(shapes.ATTRIBUTES)), shapes.OPEN))
    share = jax.random.uniform(share_key, (1, 1), minval=LEAST_OPEN)
    named = shapes.hide(hide_key, one, share)
    return shapes.sample_scene(sample_key, jnp.tile(named, (ALBUM, 1)))


@jax.jit
def photograph(key: Array, scene: shapes.Scene) -> Array:
    """Pictures [N, 64, 64, 3] in [0, 1] of scenes, with the finish of the web."""
    defect_key, sign_key, grain_key = jax.random.split(key, 3)
    defects = finish.draw_defects(defect_key, len(scene.attributes))
    return render.render(grain_key, scene, finish.from_defects(sign_key, defects))


@jax.jit
def hide_patches(key: Array, pixels: Array) -> Array:
    """Some patches of each picture made grey: up to HIDDEN_SHARE of them; pixels in [-1, 1]."""
    share_key, patch_key = jax.random.split(key)
    patch = skeleton.VIT["patch_size"]
    n, side = pixels.shape[0], shapes.IMAGE_SIZE // patch
    share = jax.random.uniform(share_key, (n, 1, 1), maxval=HIDDEN_SHARE)
    seen = jax.random.uniform(patch_key, (n, side, side)) >= share
    seen = jnp.repeat(jnp.repeat(seen, patch, axis=1), patch, axis=2)
    return pixels * seen[..., None]


def draw(key: Array) -> dict[str, Array]:
    """Two photographs of each scene of a batch.

    Returns:
        `whole` and `hidden`, [2, ALBUMS * ALBUM, 64, 64, 3] in [-1, 1].
    """
    scene_keys, photo_keys, hide_keys = (jax.random.split(k, 2) for k in jax.random.split(key, 3))
    albums = [album(k) for k in jax.random.split(scene_keys[0], ALBUMS)]
    scene = jax.tree.map(lambda *parts: jnp.concatenate(parts), *albums)
    whole = [common.to_pixels(photograph(k, scene)) for k in photo_keys]
    hidden = [hide_patches(k, pixels) for k, pixels in zip(hide_keys, whole)]
    return {"whole": jnp.stack(whole), "hidden": jnp.stack(hidden)}


def make_loss(module: vit.ViTModel):
    """DINO's objective; `ema` is the teacher; see `loop.Loss`."""

    def loss(params, ema, extra, batch, key):
        del key

        def logits(variables, pixels):
            flat = pixels.reshape(-1, *pixels.shape[2:])
            features = module.apply({"params": variables["vit"]}, flat)[:, 0]
            return apply_head(variables["head"], features).reshape(*pixels.shape[:2], -1)

        teacher = logits(ema, batch["whole"])
        by_album = teacher.reshape(2, ALBUMS, ALBUM, -1).transpose(1, 0, 2, 3)
        assigned = jax.vmap(sinkhorn)(by_album.reshape(ALBUMS, 2 * ALBUM, -1))
        assigned = assigned.reshape(by_album.shape).transpose(1, 0, 2, 3)
        targets = jax.lax.stop_gradient(assigned.reshape(teacher.shape))
        mean = jnp.mean(targets, axis=(0, 1))
        metrics = {
            # Collapse shows as a marginal entropy near 0, or as targets as flat as the marginal.
            "marginal_entropy": -jnp.sum(mean * jnp.log(mean + 1e-9)),
            "target_entropy": -jnp.mean(jnp.sum(targets * jnp.log(targets + 1e-9), axis=-1)),
        }
        return distillation_loss(logits(params, batch["hidden"]), targets), (metrics, extra)

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
        tokens: Any = model().apply({"params": params}, pixels)
        return tokens[:, 0]

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
    """Trains student and teacher; writes the teacher to encoders/dino."""
    init_key, head_key, eval_key = jax.random.split(session.key("dino-init"), 3)
    pixels = jnp.zeros((1, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 3))
    params = {
        "vit": common.spread_positions(common.initialise(model(), init_key, pixels)["params"]),
        "head": initial_head(head_key, skeleton.VIT["hidden_size"]),
    }
    teacher = fit(session, RECIPE, make_loss(model()), params, draw).ema["vit"]
    size = common.save(session.out / "encoders" / "dino", {"params": teacher}, "model")
    return evaluate(teacher, eval_key) | {"bytes": size}
