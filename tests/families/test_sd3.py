"""How the outputs of Stable Diffusion 3's text encoders become one conditioning."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.families.sd3 import StableDiffusion3, combine_with, join
from pec_jax.models.clip import CLIPTextOutput


def clip_output(value: float, length=6, width=16, shared=8) -> CLIPTextOutput:
    """Every field of another constant: value, value + .1, + .2 and + .3."""
    hidden = jnp.full((2, length, width), value, jnp.bfloat16)
    return CLIPTextOutput(
        hidden, hidden + 0.1, hidden[:, 0] + 0.2, jnp.full((2, shared), value + 0.3)
    )


def test_join_puts_clip_before_t5_and_fills_with_zeros():
    a, b, c = (
        np.full((2, length, width), v)
        for length, width, v in [(3, 4, 1.0), (3, 5, 2.0), (2, 12, 3.0)]
    )
    tokens = np.asarray(join(a, b, c))
    assert tokens.shape == (2, 5, 12)
    np.testing.assert_array_equal(tokens[0, 0], [1] * 4 + [2] * 5 + [0] * 3)
    assert (tokens[:, 3:] == 3).all()


def test_join_needs_room_for_both_towers():
    a = np.zeros((1, 3, 8))
    with pytest.raises(ValueError, match=r"8 \+ 8 wide, more than T5's 12"):
        join(a, a, np.zeros((1, 2, 12)))


def test_each_tower_stands_where_it_should():
    outputs = {"clip": clip_output(1.0), "clip_2": clip_output(2.0), "t5": jnp.full((2, 9, 40), 3)}
    found = combine_with(9, 40)(outputs, {})
    assert found.tokens.shape == (2, 15, 40) and found.mask is None
    assert found.tokens.dtype == found.pooled.dtype == jnp.float32
    np.testing.assert_array_equal(found.tokens[0, 0], [1.0] * 16 + [2.0] * 16 + [0.0] * 8)
    assert (found.tokens[:, 6:] == 3).all()
    np.testing.assert_allclose(found.pooled[0], [1.3] * 8 + [2.3] * 8, rtol=1e-6)


def test_without_t5_zeros_stand_in_its_place():
    outputs = {"clip": clip_output(1.0), "clip_2": clip_output(2.0)}
    found = combine_with(9, 40)(outputs, {})
    assert found.tokens.shape == (2, 15, 40)
    assert not found.tokens[:, 6:].any() and (found.tokens[:, :6, 0] == 1).all()


def test_the_shorter_clip_tokenizer_holds_for_both():
    lengths = {"clip": 77, "clip_2": 40, "t5": 256}
    assert StableDiffusion3.shared_lengths(lengths) == {"clip": 40, "clip_2": 40, "t5": 256}
