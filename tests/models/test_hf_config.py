"""Reading Hugging Face configs."""

from __future__ import annotations

import dataclasses

import pytest

from pec_jax.models import hf_config


@dataclasses.dataclass(frozen=True)
class Sample:
    width: int = 4
    depth: int = 2


@dataclasses.dataclass(frozen=True)
class Kinds:
    width: int = 1
    num_layers: int = 1
    share: float = 0.5
    layer_norm_eps: float = 1e-5
    flag: bool = False
    name: str | None = None
    sizes: tuple[int, ...] = ()
    other: dict[str, int] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("key", "good", "bad", "right"),
    [
        (
            "width",
            [1, 2**20],
            [0, 2**20 + 1, -1, 1.0, "2", True, [1], {}, 10**400],
            "from 1 to 104",
        ),
        ("num_layers", [1, 1000], [0, 1001, 10**7], "a whole number from 1 to 1000"),
        ("share", [0, -1.5, 1e30], ["1", float("nan"), float("inf"), True], "a finite number"),
        ("layer_norm_eps", [0, 1e-6], [-1, 2], "a number from 0 to 1"),
        ("flag", [True, False], [0, 1, "true"], "true or false"),
        ("name", ["gelu"], [5, ["gelu"]], "a string"),
        ("sizes", [[1, 2], []], [1, [0], ["x"], "12", {"a": 1}], "a list, each item a whole numb"),
        ("other", [5, "x"], [], "checked nowhere"),
    ],
)
def test_entries_have_their_type_and_range(key, good, bad, right):
    for value in good:
        assert getattr(hf_config.select(Kinds, {key: value}), key) == value
    assert hf_config.select(Kinds, {key: None}) == Kinds()
    for value in bad:
        with pytest.raises(
            ValueError, match=rf"^{key} = .* is not supported: it must be .*{right}"
        ):
            hf_config.select(Kinds, {key: value})


def test_quantised_weights_are_refused():
    with pytest.raises(ValueError, match=r"quantization_config is not supported: use .* bf16"):
        hf_config.select(Kinds, {"quantization_config": {"load_in_8bit": True}})


def test_a_section_is_an_object_or_absent():
    assert hf_config.section({"a": {"b": 1}}, "a") == {"b": 1}
    assert hf_config.section({"a": None}, "a") == hf_config.section({}, "a") == {}
    with pytest.raises(ValueError, match=r"a = \[1\] is not supported: it must be an object"):
        hf_config.section({"a": [1]}, "a")


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
