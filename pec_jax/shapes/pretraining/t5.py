"""Stage `t5`: the third text encoder, by masked-token prediction.

Tokens are masked as BERT does (Devlin et al. 2019, section 3.1) with T5's first sentinel. The
loss also reads back the tokens in plain sight, at half weight, so that each position keeps what
it says: the transformer that reads these embeddings needs the words themselves.

diffusers pads to 256 tokens unless told otherwise, and lets every token attend to the padding. So
one batch in four is padded to that length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pec_jax.models import t5
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import common, skeleton, tokenizers
from pec_jax.shapes.pretraining.loop import Recipe, Session, fit

BATCH = 128
LONG_LENGTH, LONG_BATCH = 256, 16  # diffusers' default
MASKED_SHARE = 0.3
PAD = 0
RECIPE = Recipe("t5", steps=800, learning_rate=2e-3, weight_decay=0.01)


def model(directory) -> t5.T5Encoder:
    return t5.T5Encoder(t5.T5Config.from_dict(skeleton.read_json(directory / "config.json")))


def token_ids(directory, texts: Sequence[str], length: int = tokenizers.MAX_LENGTH) -> np.ndarray:
    """Token ids of texts [N, length], padded."""
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(directory)
    ids = tokenizers.token_ids(tokenizer, texts)
    return np.pad(ids, ((0, 0), (0, length - ids.shape[1])), constant_values=PAD)


def load(out) -> tuple[t5.T5Encoder, Any]:
    """The encoder that the stage wrote into a pipeline's directory, and its variables."""
    directory = out / "text_encoder_3"
    module = model(directory)
    ids = jnp.zeros((1, tokenizers.MAX_LENGTH), jnp.int32)
    return module, common.load(directory, module, "model", ids)


def make_loss(module: t5.T5Encoder, mask_id: int):
    """Cross-entropy of masked tokens plus half that of visible ones; see `loop.Loss`."""

    def loss(params, ema, extra, ids, key):
        del ema
        real = ids != PAD
        masked = jax.random.bernoulli(key, MASKED_SHARE, ids.shape) & real
        hidden = module.apply({"params": params["t5"]}, jnp.where(masked, mask_id, ids))
        logits = hidden @ params["head"]  # [N, L, vocabulary]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        weight = jnp.where(masked, 1.0, 0.5) * real
        right = jnp.sum((jnp.argmax(logits, -1) == ids) & masked) / jnp.sum(masked)
        return jnp.sum(nats * weight) / jnp.sum(weight), ({"masked_accuracy": right}, extra)

    return loss


def run(session: Session) -> dict[str, Any]:
    """Trains on 90% of the captions; writes text_encoder_3."""
    directory = session.out / "text_encoder_3"
    module = model(directory)
    ids = token_ids(session.out / "tokenizer_3", shapes.all_captions())
    init_key, head_key, split_key, eval_key = jax.random.split(session.key("t5-init"), 4)
    shuffled = jax.random.permutation(split_key, shapes.NUM_CAPTIONS)
    held_out = shapes.NUM_CAPTIONS // 10
    width, vocabulary = module.config.d_model, module.config.vocab_size
    params = {
        "t5": common.initialise(module, init_key, ids[:1])["params"],
        "head": 0.02 * jax.random.normal(head_key, (width, vocabulary)),
    }
    loss = make_loss(module, mask_id=vocabulary - 1)
    training = jnp.asarray(ids)[shuffled[held_out:]]

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def choose(key, n, length):
        rows = jax.random.choice(key, training, (n,))
        return jnp.pad(rows, ((0, 0), (0, length - rows.shape[1])), constant_values=PAD)

    def draw(key):
        long = int(jax.random.bits(key)) % 4 == 0
        return choose(key, LONG_BATCH, LONG_LENGTH) if long else choose(key, BATCH, ids.shape[1])

    params = fit(session, RECIPE, loss, params, draw).ema
    size = common.save(directory, {"params": params["t5"]}, "model")
    unseen = jnp.asarray(ids)[shuffled[:held_out]]
    value, (metrics, _) = jax.jit(loss)(params, None, None, unseen, eval_key)
    numbers = {name: float(metric) for name, metric in metrics.items()}
    return {"loss": float(value), **numbers, "bytes": size}
