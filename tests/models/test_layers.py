"""Layers against torch and against closed forms."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from pec_jax.models import cpu, layers

KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gelu", torch.nn.functional.gelu),
        ("gelu_new", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("gelu_pytorch_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("relu", torch.relu),
        ("silu", torch.nn.functional.silu),
    ],
)
def test_activations_equal_torch(name, theirs):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(layers.activation(name)(x), theirs(torch.from_numpy(x)), atol=2e-6)


def test_unknown_activation_lists_the_known():
    with pytest.raises(ValueError, match=r"'mish'.*quick_gelu"):
        layers.activation("mish")


@pytest.mark.parametrize("timestep", [0.0, 1.0, 17.5, 999.0])
def test_sinusoidal_embedding_equals_diffusers(timestep):
    theirs = get_timestep_embedding(
        torch.tensor([timestep]), 256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    ours = layers.sinusoidal_embedding(jnp.array([timestep]), 256)
    # fp32 angles near 1000 differ in the last bit, 6e-5.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


class TestDense:
    def test_without_adapter_is_a_linear_layer(self):
        x = normal(0, 2, 3, 4)
        variables = nn.unbox(layers.Dense(5).init(KEY, x))
        params = variables["params"]
        params["bias"] = jnp.arange(5.0)
        expected = x @ np.asarray(params["kernel"]) + np.arange(5.0)
        np.testing.assert_allclose(layers.Dense(5).apply(variables, x), expected, atol=1e-6)

    def test_adapter_adds_its_product(self):
        x, a, b = normal(0, 2, 4), normal(1, 4, 2), normal(2, 2, 5)
        variables = nn.unbox(layers.Dense(5).init(KEY, x))
        base = layers.Dense(5).apply(variables, x)
        adapted = layers.Dense(5).apply({**variables, "lora": {"a": a, "b": b}}, x)
        np.testing.assert_allclose(adapted - base, x @ a @ b, atol=1e-5)

    def test_parameters_are_fp32_and_named_whatever_the_compute_dtype(self):
        dense = layers.Dense(5, dtype=jnp.bfloat16, kernel_axes=("embed", "heads"))
        out, variables = dense.init_with_output(KEY, normal(0, 2, 4))
        assert out.dtype == jnp.bfloat16
        kernel = variables["params"]["kernel"]
        assert kernel.names == ("embed", "heads")
        assert kernel.value.dtype == jnp.float32
        assert variables["params"]["bias"].names == ("heads",)


def test_product_has_the_derivatives_of_a_product():
    shapes = [(3, 5, 8), (8, 4), (8, 4)]
    x, kernel, along = (jnp.asarray(normal(i, *shape)) for i, shape in enumerate(shapes))

    def loss(multiply):
        return lambda x, kernel: jnp.sum(jnp.sin(multiply(x, kernel)))

    ours = jax.jit(jax.grad(loss(cpu.product), (0, 1)))(x, kernel)
    theirs = jax.grad(loss(jnp.dot), (0, 1))(x, kernel)
    for got, want in zip(ours, theirs):
        np.testing.assert_allclose(got, want, atol=1e-5)  # sums over 15 tokens, in another order
    tangents = (jnp.ones_like(x), along)
    ours, theirs = (jax.jvp(loss(f), (x, kernel), tangents)[1] for f in (cpu.product, jnp.dot))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


class TestAdaptedProduct:
    """Both orders of x (W + a b), against the formula."""

    @staticmethod
    def operands(fan_in, fan_out, rank, dtype=jnp.float32):
        shapes = [(3, 5, fan_in), (fan_in, fan_out), (fan_in, rank), (rank, fan_out)]
        return [jnp.asarray(normal(i, *shape) / 4, dtype) for i, shape in enumerate(shapes)]

    @pytest.mark.parametrize("rank", [1, 8])
    def test_values_and_gradients(self, rank):
        operands = self.operands(32, 24, rank)

        def loss(multiply):
            return lambda *operands: jnp.sum(jnp.sin(multiply(*operands)))

        def formula(x, kernel, a, b):
            return x @ kernel + x @ a @ b

        np.testing.assert_allclose(layers.adapted_product(*operands), formula(*operands), atol=1e-5)
        ours, theirs = (
            jax.grad(loss(f), (0, 1, 2, 3))(*operands) for f in (layers.adapted_product, formula)
        )
        for got, want in zip(ours, theirs):
            np.testing.assert_allclose(got, want, atol=1e-5)

    @pytest.mark.parametrize(
        ("rank", "dtype", "products_with_x"),
        [(1, jnp.float32, 2), (8, jnp.float32, 1), (8, jnp.bfloat16, 2)],
    )
    def test_takes_the_cheaper_order_and_never_sums_in_bfloat16(self, rank, dtype, products_with_x):
        operands = self.operands(32, 24, rank, dtype)
        jaxpr = jax.make_jaxpr(layers.adapted_product)(*operands)
        x = jaxpr.jaxpr.invars[0]
        assert sum(x in equation.invars for equation in jaxpr.eqns) == products_with_x


class TestConvolutions:
    @pytest.mark.parametrize(
        ("strides", "padding"), [((1, 1), ((1, 1), (1, 1))), ((2, 2), ((0, 1), (0, 1)))]
    )
    def test_conv_equals_torch(self, strides, padding):
        x, kernel, bias = normal(0, 2, 6, 8, 3), normal(1, 3, 3, 3, 5), normal(2, 5)
        conv = layers.Conv(5, strides=strides, padding=padding)
        ours = conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)
        padded = torch.nn.functional.pad(to_nchw(x), (*padding[1], *padding[0]))
        theirs = torch.nn.functional.conv2d(
            padded,
            torch.from_numpy(kernel).permute(3, 2, 0, 1),
            torch.from_numpy(bias),
            stride=strides,
        )
        np.testing.assert_allclose(ours, nhwc(theirs), atol=1e-5)

    def test_patch_conv_equals_a_strided_convolution(self):
        x, kernel, bias = normal(0, 2, 4, 6, 3), normal(1, 2, 2, 3, 5), normal(2, 5)
        ours = layers.PatchConv(5, 2).apply({"params": {"kernel": kernel, "bias": bias}}, x)
        conv = layers.Conv(5, (2, 2), (2, 2), ((0, 0), (0, 0)))
        theirs = conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


class TestNorms:
    def test_layer_norm_equals_torch(self):
        # A mean far from zero: E[x^2] - E[x]^2 would lose all digits here.
        x, scale, bias = 1000 + normal(0, 2, 3, 8), normal(1, 8), normal(2, 8)
        ours = layers.LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
        theirs = torch.nn.functional.layer_norm(*map(torch.from_numpy, (x,)), (8,))
        theirs = theirs * torch.from_numpy(scale) + torch.from_numpy(bias)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)

    def test_rms_norm_equals_torch(self):
        x, scale = normal(0, 2, 3, 8), normal(1, 8)
        ours = layers.RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
        theirs = torch.nn.functional.rms_norm(
            torch.from_numpy(x), (8,), torch.from_numpy(scale), 1e-6
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_group_norm_equals_torch(self, groups):
        x, scale, bias = 5 + normal(0, 2, 4, 6, 8), normal(1, 8), normal(2, 8)
        ours = layers.GroupNorm(groups).apply({"params": {"scale": scale, "bias": bias}}, x)
        theirs = torch.nn.functional.group_norm(
            to_nchw(x), groups, torch.from_numpy(scale), torch.from_numpy(bias), 1e-6
        )
        np.testing.assert_allclose(ours, nhwc(theirs), atol=1e-5)

    @pytest.mark.parametrize("norm", [layers.LayerNorm, layers.RMSNorm])
    def test_bf16_input_is_normalised_in_fp32(self, norm):
        x = jnp.asarray(100 + normal(0, 2, 64), jnp.bfloat16)
        module = norm(dtype=jnp.bfloat16)
        variables = module.init(KEY, x)
        low = module.apply(variables, x)
        high = norm().apply(variables, x.astype(jnp.float32))
        assert low.dtype == jnp.bfloat16
        np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


class Step(nn.Module):
    """x -> x + tanh(dense(x)) * t."""

    @nn.compact
    def __call__(self, x, t):
        return x + jnp.tanh(layers.Dense(x.shape[-1], name="to_out.0")(x)) * t, None


class TestRuns:
    def test_a_run_equals_its_layers_in_sequence(self):
        x = normal(0, 2, 4)
        run = layers.scan_layers(Step, 3)(name="blocks.0:3")
        variables = nn.unbox(run.init(KEY, x, 0.5))
        kernel = variables["params"]["to_out.0"]["kernel"]
        assert kernel.shape == (3, 4, 4)
        assert not np.allclose(kernel[0], kernel[1])  # every layer draws its own
        expected = x
        for i in range(3):
            layer = jax.tree.map(lambda a, i=i: a[i], variables)
            expected, _ = Step().apply(layer, expected, 0.5)
        np.testing.assert_allclose(run.apply(variables, x, 0.5)[0], expected, atol=1e-6)

    @pytest.mark.parametrize(
        "options",
        [
            {"remat": "full"},
            {"remat": "dots"},
            {"remat": "attention"},
            {"unroll": 1},
            {"unroll": 3},
        ],
    )
    def test_remat_and_unroll_change_nothing(self, options):
        x = normal(0, 2, 4)
        plain = layers.scan_layers(Step, 3)()
        other = layers.scan_layers(Step, 3, **options)()
        variables = nn.unbox(plain.init(KEY, x, 0.5))
        gradients = [
            jax.jit(jax.grad(lambda v, m=m: m.apply(v, x, 0.5)[0].sum()))(variables)
            for m in (plain, other)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)
        same = other.init(KEY, x, 0.5)
        jax.tree.map(np.testing.assert_array_equal, nn.unbox(same), variables)

    def test_stacked_parameters_name_the_layer_axis(self):
        variables = layers.scan_layers(Step, 2)().init(KEY, normal(0, 2, 4), 0.5)
        assert variables["params"]["to_out.0"]["kernel"].names == ("layers", "embed", "mlp")

    def test_long_runs_stay_loops(self):
        run = layers.scan_layers(Step, cpu.MAX_UNROLLED + 1)()
        x = normal(0, 2, 4)
        variables = run.init(KEY, x, 0.5)
        lowered = jax.jit(run.apply).lower(variables, x, 0.5).as_text()
        assert "stablehlo.while" in lowered

    def test_a_program_for_tpus_has_what_is_for_cpus_nowhere(self):
        """On whatever machine it is compiled: a loop, and an adapter beside its layer."""
        x, run = normal(0, 2, 4), layers.scan_layers(Step, 2)()
        variables = nn.unbox(run.init(KEY, x, 0.5))
        adapter = {"a": normal(1, 2, 4, 4), "b": normal(2, 2, 4, 4)}
        variables["lora"] = {"to_out.0": adapter}
        here = str(jax.make_jaxpr(layers.scan_layers(Step, 2)().apply)(variables, x, 0.5))
        chip = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=chip)
        with jax.sharding.use_abstract_mesh(mesh):
            there = str(jax.make_jaxpr(layers.scan_layers(Step, 2)().apply)(variables, x, 0.5))
        assert "unroll=2" in here and "name=product" in here
        assert "unroll=1" in there and "name=product" not in there

    def test_names_of_a_run(self):
        path = ["decoder", layers.run_name("blocks", 2, 4), "to_out.0"]
        assert layers.expand_runs(path) == [
            "decoder.blocks.2.to_out.0",
            "decoder.blocks.3.to_out.0",
        ]
        assert layers.expand_runs(["a.0", "b"]) == ["a.0.b"]

    def test_nested_runs_are_refused(self):
        with pytest.raises(ValueError, match="nested"):
            layers.expand_runs(["a.0:2", "b.0:2"])
