"""The mapping between torch names and ours."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pec_jax.models import layers
from pec_jax.weights.convert import (
    abstract_variables,
    count_parameters,
    from_torch,
    placed_shapes,
    to_torch,
)
from pec_jax.weights.tensors import WeightsError, read_tensors, write_tensors


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = layers.LayerNorm(name="norm1")(x)
        return layers.Dense(x.shape[-1], name="to_out.0")(x), None


class Net(nn.Module):
    """One of each kind of leaf, with a scanned run of layers 1 and 2 and a stored buffer."""

    @nn.compact
    def __call__(self, images, ids):
        self.variable("buffers", "table", lambda: jnp.arange(3.0))
        gain = self.param("logit_scale", nn.initializers.ones, ())
        x = layers.Conv(4, (3, 2), padding=((1, 1), (0, 1)), name="conv_in")(images)
        x = x.mean(axis=(1, 2)) + layers.Embed(7, 4, name="embed_tokens")(ids)
        x, _ = Block(name="blocks.0")(x)
        x, _ = layers.scan_layers(Block, 2)(name=layers.run_name("blocks", 1, 3))(x)
        return gain * layers.Dense(5, use_bias=False, name="head")(x)


ARGUMENTS = (jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32))
SHAPES = {
    "table": (3,),
    "logit_scale": (),
    "conv_in.weight": (4, 3, 3, 2),
    "conv_in.bias": (4,),
    "embed_tokens.weight": (7, 4),
    "head.weight": (5, 4),
    **{f"blocks.{i}.norm1.{leaf}": (4,) for i in range(3) for leaf in ("weight", "bias")},
    **{f"blocks.{i}.to_out.0.weight": (4, 4) for i in range(3)},
    **{f"blocks.{i}.to_out.0.bias": (4,) for i in range(3)},
}


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def shapes():
    return abstract_variables(Net(), *ARGUMENTS)


class TestFromTorch:
    def test_every_leaf_lands_in_our_layout(self, state, shapes):
        variables = from_torch(state, shapes)
        params = variables["params"]
        np.testing.assert_array_equal(params["head"]["kernel"], state["head.weight"].T)
        np.testing.assert_array_equal(
            params["conv_in"]["kernel"], state["conv_in.weight"].transpose(2, 3, 1, 0)
        )
        np.testing.assert_array_equal(
            params["embed_tokens"]["embedding"], state["embed_tokens.weight"]
        )
        run = params["blocks.1:3"]
        for i in range(2):
            kernel = state[f"blocks.{i + 1}.to_out.0.weight"].T
            np.testing.assert_array_equal(run["to_out.0"]["kernel"][i], kernel)
            scale = state[f"blocks.{i + 1}.norm1.weight"]
            np.testing.assert_array_equal(run["norm1"]["scale"][i], scale)
        np.testing.assert_array_equal(variables["buffers"]["table"], state["table"])
        assert params["logit_scale"] == state["logit_scale"]

    def test_structure_and_shapes_are_those_of_init(self, state, shapes):
        variables = from_torch(state, shapes)
        assert jax.tree.structure(variables) == jax.tree.structure(shapes)
        jax.tree.map(lambda a, s: np.testing.assert_equal(a.shape, s.shape), variables, shapes)

    def test_round_trip_is_bit_for_bit(self, state, shapes):
        back = to_torch(from_torch(state, shapes))
        assert set(back) == set(state)
        for name, array in state.items():
            assert back[name].tobytes() == array.tobytes(), name
            assert back[name].flags.c_contiguous

    def test_dtype(self, state, shapes):
        half = {name: array.astype(np.float16) for name, array in state.items()}
        assert {a.dtype for a in jax.tree.leaves(from_torch(half, shapes))} == {np.dtype("float32")}
        low = from_torch(state, shapes, dtype=jnp.bfloat16)
        assert low["params"].pop("logit_scale").dtype == np.float32
        assert {a.dtype for a in jax.tree.leaves(low)} == {np.dtype(jnp.bfloat16)}

    @pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
    def test_float8(self, state, shapes, kind):
        low = {name: array.astype(kind) for name, array in state.items()}
        exact = {name: array.astype(np.float32) for name, array in low.items()}
        found, expected = from_torch(low, shapes), from_torch(exact, shapes)
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    def test_a_scalar_is_kept_to_the_last_bit(self, state, shapes):
        """CLIP's logit scale ln 100 in bfloat16 is 4.59375, and its exp 98.864 for 100."""
        state["logit_scale"] = np.float32(4.60517)
        low = from_torch(state, shapes, dtype=jnp.bfloat16)
        assert low["params"]["logit_scale"] == np.float32(4.60517)
        planned = placed_shapes(shapes, dtype=jnp.bfloat16)
        same = jax.tree.map(lambda a, s: (a.shape, a.dtype) == (s.shape, s.dtype), low, planned)
        assert jax.tree.all(same)

    def test_ignored_names_may_be_there(self, state, shapes):
        state["text.position_ids"] = np.arange(3)
        from_torch(state, shapes, ignore=(r".*\.position_ids",))
        with pytest.raises(WeightsError, match="position_ids"):
            from_torch(state, shapes, ignore=("position_ids",))  # the whole name must match

    @pytest.mark.parametrize("prefix", ["", "_orig_mod."])
    def test_of_compiled_modules(self, state, shapes, tmp_path, prefix):
        """torch.compile puts a prefix before all names, or before those inside of one module."""
        names = {n: prefix + n.replace("blocks.1.", "blocks.1._orig_mod.") for n in state}
        write_tensors(tmp_path, {names[name]: value for name, value in state.items()})
        found, expected = from_torch(read_tensors(tmp_path), shapes), from_torch(state, shapes)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


class TestClearErrors:
    def test_missing(self, state, shapes):
        del state["blocks.2.to_out.0.bias"]
        with pytest.raises(
            WeightsError, match=r"1 tensors are missing.*'blocks\.2\.to_out\.0\.bias'"
        ):
            from_torch(state, shapes)

    def test_extra(self, state, shapes):
        state["blocks.3.norm1.weight"] = np.ones(4)
        with pytest.raises(WeightsError, match=r"no place in the network.*'blocks\.3\.norm1"):
            from_torch(state, shapes)

    def test_many_are_summed_up(self, shapes):
        with pytest.raises(WeightsError, match=r"18 tensors are missing.*and 13 more"):
            from_torch({}, shapes)

    @pytest.mark.parametrize("name", ["head.weight", "blocks.1.to_out.0.bias"])
    def test_shape_in_a_file(self, state, shapes, tmp_path, name):
        state[name] = np.ones((9, 2), np.float32)
        path = write_tensors(tmp_path, state)
        with pytest.raises(WeightsError) as error:
            from_torch(read_tensors(tmp_path), shapes)
        for part in (str(path), repr(name), "[9, 2]", str(list(SHAPES[name]))):
            assert part in str(error.value)

    def test_transposed_square_of_another_name_is_no_excuse(self, state, shapes):
        state["conv_in.weight"] = state["conv_in.weight"].transpose(2, 3, 1, 0)
        with pytest.raises(WeightsError, match=r"conv_in\.weight.*\[3, 2, 3, 4\].*\[4, 3, 3, 2\]"):
            from_torch(state, shapes)


class TestToTorch:
    def test_takes_boxed_variables_and_leaves_adapters_out(self):
        arguments = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), ARGUMENTS)
        boxed = jax.jit(Net().init)(jax.random.key(0), *arguments)
        named = to_torch({**boxed, "lora": {"head": {"a": jnp.ones((4, 1))}}})
        assert {name: array.shape for name, array in named.items()} == SHAPES
        back = from_torch(named, nn.unbox(boxed))
        jax.tree.map(np.testing.assert_array_equal, back, nn.unbox(boxed))

    def test_count_leaves_buffers_out(self, shapes):
        assert count_parameters(shapes) == sum(
            int(np.prod(shape)) for name, shape in SHAPES.items() if name != "table"
        )


def test_orbax_keeps_our_names(state, shapes, tmp_path):
    """Names with "." and ":" must survive a checkpoint, against an abstract tree."""
    variables = from_torch(state, shapes)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(1, args=ocp.args.StandardSave(variables))
        manager.wait_until_finished()
        restored = manager.restore(1, args=ocp.args.StandardRestore(shapes))
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
