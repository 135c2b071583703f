"""LoRA: the hook in linear layers, merging, and which layers a pattern takes."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

from pec_jax.models import lora
from pec_jax.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=2,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=6,
    out_channels=2,
    pos_embed_max_size=4,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)
QKV = (r"attn2?\.to_(q|k|v)$",)
KEY = jax.random.key(0)


def jittered(tree, scale: float = 0.2):
    """Every leaf moved by noise, so that no gradient is zero by a closed gate."""
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda a: np.asarray(a) + scale * rng.normal(size=a.shape).astype(np.float32), tree
    )


@pytest.fixture(scope="module")
def model():
    module = MMDiT(CONFIG)
    rng = np.random.default_rng(0)
    arrays = tuple(
        rng.normal(size=s).astype(np.float32) for s in [(2, 4, 4, 2), (2,), (2, 3, 12), (2, 6)]
    )
    variables = jittered(nn.unbox(jax.jit(module.init)(KEY, *arrays)))
    return jax.jit(module.apply), variables, arrays


def trained(variables, patterns=QKV, rank: int = 3):
    return jittered(lora.init(variables["params"], patterns, rank, KEY))


def test_a_new_adapter_changes_nothing(model):
    apply, variables, arrays = model
    adapter = lora.init(variables["params"], QKV, 3, KEY)
    adapted = apply({**variables, "lora": lora.scaled(adapter, 6.0, 3)}, *arrays)
    np.testing.assert_array_equal(adapted, apply(variables, *arrays))


@pytest.mark.parametrize("patterns", [QKV, (r".",)], ids=["qkv", "all linear layers"])
def test_merged_weights_equal_the_hook(model, patterns):
    apply, variables, arrays = model
    adapter = lora.scaled(trained(variables, patterns), 6.0, 3)
    hooked = apply({**variables, "lora": adapter}, *arrays)
    merged = {**variables, "params": lora.merge(variables["params"], adapter)}
    base = apply(variables, *arrays)
    assert np.abs(hooked - base).max() > 0.05 * np.abs(base).max()
    np.testing.assert_allclose(apply(merged, *arrays), hooked, atol=2e-4 * np.abs(base).max())


def test_gradient_starts_in_b_and_reaches_both(model):
    apply, variables, arrays = model

    def gradient(adapter):
        def loss(a):
            return (apply({**variables, "lora": lora.scaled(a, 6.0, 3)}, *arrays) ** 2).mean()

        return jax.jit(jax.grad(loss))(adapter)

    def norms(tree, leaf):
        return [
            float(np.abs(value).max())
            for path, value in jax.tree.leaves_with_path(tree)
            if path[-1].key == leaf
        ]

    fresh = gradient(lora.init(variables["params"], QKV, 3, KEY))
    assert max(norms(fresh, "a")) == 0.0  # b = 0 lets nothing through to a
    assert min(norms(fresh, "b")) > 0.0
    later = gradient(trained(variables))
    assert min(norms(later, "a") + norms(later, "b")) > 0.0


def test_adapters_of_a_run_carry_a_layer_axis(model):
    _, variables, _ = model
    adapter = lora.init(variables["params"], QKV, 3, KEY)
    assert set(adapter) == {"transformer_blocks.0:2", "transformer_blocks.2:3"}
    dual = adapter["transformer_blocks.0:2"]
    assert set(dual) == {"attn", "attn2"}
    assert set(dual["attn"]) == {"to_q", "to_k", "to_v"}
    assert dual["attn"]["to_q"]["a"].shape == (2, 16, 3)
    assert dual["attn"]["to_q"]["b"].shape == (2, 3, 16)
    assert lora.count(adapter) == 3 * 16 * 2 * (2 * 6 + 3)


def test_layers_draw_apart_and_do_not_depend_on_other_patterns(model):
    _, variables, _ = model
    few = lora.init(variables["params"], (r"attn\.to_q$",), 3, KEY)
    many = lora.init(variables["params"], (r"ff\.", r"attn\.to_(q|k)$"), 3, KEY)
    run = "transformer_blocks.0:2"
    a = few[run]["attn"]["to_q"]["a"]
    np.testing.assert_array_equal(a, many[run]["attn"]["to_q"]["a"])
    assert not np.allclose(a[0], a[1])
    assert not np.allclose(a, many[run]["attn"]["to_k"]["a"])


def test_initial_spread_is_one_over_the_rank(model):
    _, variables, _ = model
    adapter = lora.init(variables["params"], (r".",), 8, KEY)
    a = np.concatenate(
        [
            np.ravel(value)
            for path, value in jax.tree.leaves_with_path(adapter)
            if path[-1].key == "a"
        ]
    )
    assert abs(a.std() * 8 - 1) < 0.05
    assert abs(a.mean() * 8) < 0.05


def test_works_on_shapes_alone(model):
    _, variables, _ = model
    abstract = jax.eval_shape(lambda: variables["params"])
    shapes = jax.eval_shape(lambda: lora.init(variables["params"], QKV, 3, KEY))
    found = lora.init(abstract, QKV, 3, KEY)
    assert jax.tree.map(lambda a: a.shape, found) == jax.tree.map(lambda a: a.shape, shapes)


class TestClearErrors:
    def test_unmatched_pattern_lists_the_names(self, model):
        _, variables, _ = model
        with pytest.raises(ValueError, match=r"'query'.*transformer_blocks.N.attn.to_q"):
            lora.init(variables["params"], ("query",), 3, KEY)

    def test_half_a_run(self, model):
        _, variables, _ = model
        with pytest.raises(ValueError, match=r"transformer_blocks.1.attn.to_q.*one run"):
            lora.init(variables["params"], (r"blocks\.1\.attn\.to_q$",), 3, KEY)

    def test_a_whole_run_by_number(self, model):
        _, variables, _ = model
        adapter = lora.init(variables["params"], (r"blocks\.(0|1)\.attn\.to_q$",), 3, KEY)
        assert set(adapter) == {"transformer_blocks.0:2"}

    @pytest.mark.parametrize(("patterns", "rank"), [((), 3), (QKV, 0)])
    def test_nothing_to_do(self, model, patterns, rank):
        _, variables, _ = model
        with pytest.raises(ValueError, match="LoRA"):
            lora.init(variables["params"], patterns, rank, KEY)

    def test_merge_into_another_network(self, model):
        _, variables, _ = model
        adapter = trained(variables)
        params = {k: v for k, v in variables["params"].items() if k != "transformer_blocks.2:3"}
        with pytest.raises(ValueError, match="no such layer"):
            lora.merge(params, adapter)
        wrong = jax.tree.map(lambda a: a[..., :-1, :], adapter)
        with pytest.raises(ValueError, match="the network has"):
            lora.merge(variables["params"], wrong)
