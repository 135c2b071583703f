"""Stage `clip`: the contrastive encoder, and the two CLIP text towers of the pipeline.

A vision tower and two text towers learn one space from images and captions with the symmetric
cross-entropy of Radford et al. 2021, section 2.3. Captions that occur twice in a batch share their
targets (Yang et al. 2022, UniCL, equation 3): an equal caption is no negative.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pec_jax.models import clip
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import common, skeleton, tokenizers
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit

STEM = "model"
BATCH = 128
SECOND_TOWER_WEIGHT = 0.5
MAX_LOG_SCALE = float(np.log(100.0))
RECIPE = Recipe("clip", steps=3000, learning_rate=2e-3, weight_decay=0.05, warmup=100)


def model(directory) -> clip.CLIPModel:
    config = skeleton.read_json(directory / "config.json")
    return clip.CLIPModel(clip.CLIPConfig.from_dict(config))


def text_model(directory) -> clip.CLIPTextModel:
    config = skeleton.read_json(directory / "config.json")
    return clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(config))


def caption_ids(directory) -> np.ndarray:
    """Token ids of every caption, [17640, 12], by `shapes.caption_index`."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(directory)
    return tokenizers.token_ids(tokenizer, shapes.all_captions())


def contrastive_loss(image: jax.Array, text: jax.Array, scale: jax.Array, captions: jax.Array):
    """Symmetric cross-entropy between images and captions, equal captions being equally right.

    L = (CE(scale f g^T, T) + CE(scale g f^T, T)) / 2, T = same / sum(same).

    Args:
        image: unit features f [N, d].
        text: unit features g [N, d].
        scale: exp(logit_scale).
        captions: [N] index of each row's caption; rows with the same index are the same caption.

    Returns:
        A scalar, nats.
    """
    logits = scale * image @ text.T  # [N images, N captions]
    same = (captions[:, None] == captions[None, :]).astype(jnp.float32)
    targets = same / jnp.sum(same, axis=-1, keepdims=True)
    by_image = optax.softmax_cross_entropy(logits, targets)
    by_text = optax.softmax_cross_entropy(logits.T, targets)
    return 0.5 * jnp.mean(by_image + by_text)


def captioned_images(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Augmented images [n, 64, 64, 3], attributes [n, 6], and indices of captions that fit [n]."""
    image_key, hide_key, augment_key = jax.random.split(key, 3)
    drawn = common.draw_pictures(image_key, n)
    captions = shapes.caption_index(common.hide_some(hide_key, drawn.attributes))
    return common.augment(augment_key, drawn.images), drawn.attributes, captions


def make_loss(module: clip.CLIPModel, second: clip.CLIPTextModel):
    """The objective over {"clip", "text_2"} jointly; see `loop.Loss`."""

    def loss(params, ema, extra, batch, key):
        del ema, key
        captions, pixels = batch["captions"], common.to_pixels(batch["images"])
        text, image = module.apply({"params": params["clip"]}, batch["ids"], pixels)
        second_text = second.apply({"params": params["text_2"]}, batch["ids_2"])
        image, text = common.normalise(image), common.normalise(text)
        scale = jnp.exp(jnp.minimum(params["clip"]["logit_scale"], MAX_LOG_SCALE))
        first = contrastive_loss(image, text, scale, captions)
        other = contrastive_loss(image, common.normalise(second_text.text_embeds), scale, captions)
        metrics = {"first": first, "second": other, "scale": scale}
        return first + SECOND_TOWER_WEIGHT * other, (metrics, extra)

    return loss


def retrieval(image_features: np.ndarray, text_features: np.ndarray, target: np.ndarray) -> float:
    """Share of images whose nearest text is their own: features [N, d], [M, d], target [N]."""
    image = image_features / np.linalg.norm(image_features, axis=-1, keepdims=True)
    text = text_features / np.linalg.norm(text_features, axis=-1, keepdims=True)
    return float(np.mean(np.argmax(image @ text.T, axis=-1) == target))


def evaluate(module, params, ids: np.ndarray, key: jax.Array) -> dict[str, Any]:
    """Held-out retrieval and loss of a CLIP.

    Args:
        module: the CLIPModel.
        params: its parameters.
        ids: [17640, L] token ids of all captions.
        key: of the held-out images.

    Returns:
        `retrieval`: top-1 among the 4320 captions that name everything; `accuracy/<attribute>`:
        the share of these whose attribute is right; `loss`: held-out contrastive loss.
    """
    scene_key, hide_key = jax.random.split(key)
    drawn = common.draw_pictures(scene_key, 2048)
    images, attributes = drawn.images, drawn.attributes
    features = np.asarray(
        jax.jit(lambda p, x: module.apply({"params": p}, x, method="get_image_features"))(
            params, common.to_pixels(images)
        )
    )
    text_features = np.asarray(
        jax.jit(lambda p, i: module.apply({"params": p}, i, method="get_text_features"))(
            params, jnp.asarray(ids)
        )
    )
    rows = shapes.all_attributes()
    full = np.flatnonzero((rows >= 0).all(-1))
    own = np.asarray(shapes.caption_index(attributes))
    image = features / np.linalg.norm(features, axis=-1, keepdims=True)
    text = text_features / np.linalg.norm(text_features, axis=-1, keepdims=True)
    found = rows[full][np.argmax(image @ text[full].T, axis=-1)]  # [N, 6]
    right = np.mean(found == np.asarray(attributes), axis=0)
    captions = shapes.caption_index(common.hide_some(hide_key, attributes))[:BATCH]
    scale = np.exp(min(float(params["logit_scale"]), MAX_LOG_SCALE))
    held_out = contrastive_loss(image[:BATCH], text[np.asarray(captions)], scale, captions)
    return {
        "loss": float(held_out),
        "retrieval": retrieval(features, text_features[full], np.searchsorted(full, own)),
        **{f"accuracy/{name}": float(r) for name, r in zip(shapes.ATTRIBUTES, right)},
    }


def run(session: Session) -> dict[str, Any]:
    """Trains the three towers; writes encoders/clip, text_encoder and text_encoder_2."""
    out = session.out
    module, second = model(out / "encoders" / "clip"), text_model(out / "text_encoder_2")
    ids, ids_2 = caption_ids(out / "tokenizer"), caption_ids(out / "tokenizer_2")
    keys = jax.random.split(session.key("clip-init"), 3)
    pixels = jnp.zeros((1, 64, 64, 3))
    params = {
        "clip": common.spread_positions(
            common.initialise(module, keys[0], ids[:1], pixels)["params"]
        ),
        "text_2": common.initialise(second, keys[1], ids[:1])["params"],
    }

    def draw(key):
        images, _, captions = captioned_images(key, BATCH)
        rows = np.asarray(captions)
        return {"images": images, "captions": captions, "ids": ids[rows], "ids_2": ids_2[rows]}

    params = fit(session, RECIPE, make_loss(module, second), params, draw).ema
    whole = params["clip"]
    text = {name: whole[name] for name in ("text_model", "text_projection")}
    sizes = [
        common.save(out / "encoders" / "clip", {"params": whole}, STEM),
        common.save(out / "text_encoder", {"params": text}, STEM),
        common.save(out / "text_encoder_2", {"params": params["text_2"]}, STEM),
    ]
    numbers = evaluate(module, whole, ids, keys[2])
    output_2: Any = second.apply({"params": params["text_2"]}, jnp.asarray(ids_2))
    text_2 = np.asarray(output_2.text_embeds)
    drawn = common.draw_pictures(jax.random.fold_in(keys[2], 1), 1024)
    pixels = common.to_pixels(drawn.images)
    image = module.apply({"params": whole}, pixels, method="get_image_features")
    full = np.flatnonzero((shapes.all_attributes() >= 0).all(-1))
    target = np.searchsorted(full, np.asarray(shapes.caption_index(drawn.attributes)))
    numbers["retrieval_second"] = retrieval(np.asarray(image), text_2[full], target)
    return numbers | {"bytes": sum(sizes)}
