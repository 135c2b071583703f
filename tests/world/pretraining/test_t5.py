"""Masked-token prediction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.world.pretraining import t5

VOCABULARY, MASK = 7, 6


class Copier:
    """A text encoder whose hidden states are the tokens it sees, one-hot and certain."""

    def apply(self, variables, ids):
        self.seen = ids
        return 50.0 * jax.nn.one_hot(ids, VOCABULARY)


def run(ids, key):
    copier = Copier()
    params = {"t5": {}, "head": jnp.eye(VOCABULARY)}
    value, (metrics, _) = t5.make_loss(copier, MASK)(params, None, None, ids, key)
    return float(value), metrics, np.asarray(copier.seen)


def test_only_real_tokens_are_masked_and_weighed():
    ids = jnp.tile(jnp.array([[3, 4, 5, 1] + [t5.PAD] * 10]), (500, 1))
    value, metrics, seen = run(ids, jax.random.key(0))
    masked = seen == MASK
    assert not masked[:, 4:].any()
    assert 0.25 < masked[:, :4].mean() < 0.35
    # A copier reads visible tokens for nothing and is wrong by 50 nats at each masked one.
    share = masked[:, :4].mean()
    np.testing.assert_allclose(value, 50.0 * share / (share + 0.5 * (1 - share)), rtol=1e-3)
    assert float(metrics["masked_accuracy"]) == 0.0
