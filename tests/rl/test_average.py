"""The average of the parameters: the plain one, and Flow-GRPO's call pattern replayed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.rl.average import Average


def test_by_default_it_moves_with_every_update():
    ema = Average(0.9).moved({"w": jnp.zeros(3)}, {"w": jnp.ones(3)}, jnp.int32(1))
    np.testing.assert_allclose(ema["w"], 0.1, rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2, 6])
def test_it_is_flow_grpos(micro_batches):
    """Which calls it after every micro-batch with the number of updates so far."""
    parameters = np.random.default_rng(0).normal(size=(60, 4))
    theirs, ours = np.zeros(4), {"w": jnp.zeros(4)}
    average = Average(0.9, every=8, repeats=micro_batches, warmup=True)
    updates = 0
    for new in parameters:
        for micro in range(micro_batches):
            if micro == micro_batches - 1:  # the optimizer's step is at the end of an update
                updates, current = updates + 1, new
            elif not updates:
                continue  # before the first update all weights are the base model's
            if (updates + 1) % 8 == 0:
                decay = min((1 + updates) / (10 + updates), 0.9)
                theirs = theirs + (1 - decay) * (current - theirs)
        ours = average.moved(ours, {"w": jnp.asarray(new, jnp.float32)}, jnp.int32(updates))
    # The last update's repeats fall into the next one's micro-batches there.
    pending = micro_batches - 1 if (updates + 1) % 8 == 0 else 0
    for _ in range(pending):
        theirs = theirs + (1 - decay) * (current - theirs)
    np.testing.assert_allclose(ours["w"], theirs, rtol=1e-5, atol=1e-6)
