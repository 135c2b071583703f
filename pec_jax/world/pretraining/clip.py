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

from pec_jax.shapes.pretraining import clip as stage
from pec_jax.shapes.pretraining import common as base
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit
from pec_jax.world import scenes as shapes
from pec_jax.world.pretraining import common

STEM = "model"
BATCH = 256
RECIPE = Recipe("clip", steps=3000, learning_rate=2e-3, weight_decay=0.05, warmup=100)


def caption_ids(directory) -> np.ndarray:
    """Token ids of every caption, [17640, 14], by `shapes.caption_index`."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(directory)
    return tokenizers.token_ids(tokenizer, shapes.all_captions())


def captioned_images(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Augmented images [n, 64, 64, 3], attributes [n, 6], and indices of captions that fit [n]."""
    image_key, hide_key, augment_key = jax.random.split(key, 3)
    drawn = common.draw_pictures(image_key, n)
    captions = shapes.caption_index(base.hide_some(hide_key, drawn.attributes))
    return common.augment(augment_key, drawn.images), drawn.attributes, captions


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
            params, base.to_pixels(images)
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
    captions = shapes.caption_index(base.hide_some(hide_key, attributes))[:BATCH]
    scale = np.exp(min(float(params["logit_scale"]), stage.MAX_LOG_SCALE))
    held_out = stage.contrastive_loss(image[:BATCH], text[np.asarray(captions)], scale, captions)
    return {
        "loss": float(held_out),
        "retrieval": stage.retrieval(features, text_features[full], np.searchsorted(full, own)),
        **{f"accuracy/{name}": float(r) for name, r in zip(shapes.ATTRIBUTES, right)},
    }


def run(session: Session) -> dict[str, Any]:
    """Trains the three towers; writes encoders/clip, text_encoder and text_encoder_2."""
    out = session.out
    module, second = (
        stage.model(out / "encoders" / "clip"),
        stage.text_model(out / "text_encoder_2"),
    )
    ids, ids_2 = caption_ids(out / "tokenizer"), caption_ids(out / "tokenizer_2")
    keys = jax.random.split(session.key("clip-init"), 3)
    pixels = jnp.zeros((1, 64, 64, 3))
    params = {
        "clip": base.spread_positions(base.initialise(module, keys[0], ids[:1], pixels)["params"]),
        "text_2": base.initialise(second, keys[1], ids[:1])["params"],
    }

    def draw(key):
        images, _, captions = captioned_images(key, BATCH)
        rows = np.asarray(captions)
        return {"images": images, "captions": captions, "ids": ids[rows], "ids_2": ids_2[rows]}

    params = fit(session, RECIPE, stage.make_loss(module, second), params, draw).ema
    whole = params["clip"]
    text = {name: whole[name] for name in ("text_model", "text_projection")}
    sizes = [
        base.save(out / "encoders" / "clip", {"params": whole}, STEM),
        base.save(out / "text_encoder", {"params": text}, STEM),
        base.save(out / "text_encoder_2", {"params": params["text_2"]}, STEM),
    ]
    numbers = evaluate(module, whole, ids, keys[2])
    output_2: Any = second.apply({"params": params["text_2"]}, jnp.asarray(ids_2))
    text_2 = np.asarray(output_2.text_embeds)
    drawn = common.draw_pictures(jax.random.fold_in(keys[2], 1), 1024)
    pixels, attributes = base.to_pixels(drawn.images), drawn.attributes
    image = module.apply({"params": whole}, pixels, method="get_image_features")
    full = np.flatnonzero((shapes.all_attributes() >= 0).all(-1))
    target = np.searchsorted(full, np.asarray(shapes.caption_index(attributes)))
    numbers["retrieval_second"] = stage.retrieval(np.asarray(image), text_2[full], target)
    return numbers | {"bytes": sum(sizes)}
