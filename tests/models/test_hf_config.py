"""Reading Hugging Face configs."""

from __future__ import annotations

import dataclasses

import pytest

from pec_jax.models import hf_config


@dataclasses.dataclass(frozen=True)
class Sample:
    width: int = 4
    depth: int = 2


def test_select_takes_known_entries_and_overrides():
    assert hf_config.select(Sample, {"width": 8, "torch_dtype": "float32"}) == Sample(8, 2)
    assert hf_config.select(Sample, {"width": 8}, width=9, depth=1) == Sample(9, 1)


def test_square_takes_a_number_or_two_equal_sides():
    assert hf_config.square("image_size", 32) == hf_config.square("image_size", [32, 32]) == 32
    with pytest.raises(ValueError, match=r"image_size = \[32, 16\]"):
        hf_config.square("image_size", [32, 16])


def test_messages_name_key_value_and_choices():
    with pytest.raises(ValueError, match="norm = 'batch' is not supported; supported: 'layer'"):
        hf_config.check_choice("norm", "batch", ("layer",))
    with pytest.raises(ValueError, match=r"act = 'mish' .*'quick_gelu'"):
        hf_config.check_activation("act", "mish")
    with pytest.raises(ValueError, match=r"hidden_size = 10 .*num_attention_heads = 4"):
        hf_config.check_heads(10, 4)
    hf_config.check_heads(12, 4)
