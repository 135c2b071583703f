"""The MMDiT against diffusers' SD3Transformer2DModel, at its own tensor names."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pec_jax.families.sd3 import StableDiffusion3
from pec_jax.models.mmdit import MMDiT, MMDiTConfig, sincos_position_table
from pec_jax.profiling import flops
from pec_jax.weights.convert import count_parameters, from_torch, leaves, to_torch

SD35 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 12,
    "num_attention_heads": 4,
    "joint_attention_dim": 40,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}
# Name -> (config, latent height, latent width, text tokens).
CASES = {
    "sd35": (SD35, 8, 8, 28),
    "sd3, not square, odd number of tokens": (
        SD35 | {"dual_attention_layers": (), "qk_norm": None},
        10,
        6,
        7,
    ),
    "mixed runs, dual attention in the last layer too": (
        SD35 | {"num_layers": 5, "dual_attention_layers": (1, 2, 4), "patch_size": 1},
        3,
        5,
        1,
    ),
    "one layer, rms norm only, 3 channels in": (
        SD35
        | {
            "num_layers": 1,
            "dual_attention_layers": (),
            "in_channels": 3,
            "out_channels": None,
            "attention_head_dim": 20,
            "num_attention_heads": 1,
            "caption_projection_dim": 20,
        },
        6,
        12,
        5,
    ),
    "sd3 2b: no dual attention, long run": (
        SD35 | {"num_layers": 7, "dual_attention_layers": (), "qk_norm": None},
        4,
        6,
        3,
    ),
    "sd35 large: qk norm without dual attention, big heads, tall": (
        SD35
        | {
            "num_layers": 6,
            "dual_attention_layers": (),
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "caption_projection_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
        },
        20,
        2,
        33,
    ),
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from zero and one, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.3 + 0.3 * noise)
    return model.eval()


def inputs(config: dict, height: int, width: int, length: int, batch: int = 2):
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(batch, height, width, config["in_channels"])),
        1000 * rng.integers(1, 1024, size=(batch,)) / 1024,  # exact after a division by 1000
        rng.normal(size=(batch, length, config["joint_attention_dim"])),
        rng.normal(size=(batch, config["pooled_projection_dim"])),
    )
    return tuple(a.astype(np.float32) for a in arrays)


def torch_velocity(model, x, timestep, tokens, pooled) -> np.ndarray:
    with torch.no_grad():
        out = model(
            hidden_states=torch.from_numpy(x).permute(0, 3, 1, 2).to(model.dtype),
            timestep=torch.from_numpy(timestep),
            encoder_hidden_states=torch.from_numpy(tokens).to(model.dtype),
            pooled_projections=torch.from_numpy(pooled).to(model.dtype),
        ).sample
    return out.permute(0, 2, 3, 1).float().numpy()


def full_size_names(abstract, network: type, **config):
    """(our number of parameters, our tensors' names and shapes, diffusers' on the meta device)."""
    names = {
        name: leaf.torch_shape(value.shape)
        for leaf, value in leaves(abstract)
        for name in leaf.names
    }
    with torch.device("meta"):
        theirs = network(**config).state_dict()
    return count_parameters(abstract), names, {n: tuple(t.shape) for n, t in theirs.items()}


@pytest.fixture(scope="module", params=list(CASES), ids=list(CASES))
def pair(request):
    """(our network, its variables, diffusers' network, inputs)."""
    config, height, width, length = CASES[request.param]
    theirs = randomize(diffusers.SD3Transformer2DModel(**config))
    ours = MMDiT(MMDiTConfig.from_dict(dict(theirs.config)))
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    variables = from_torch(state, StableDiffusion3.transformer_network.shapes(ours))
    return ours, variables, theirs, inputs(config, height, width, length)


class TestDiffusersAgrees:
    def test_velocity(self, pair):
        ours, variables, theirs, arrays = pair
        expected = torch_velocity(theirs, *arrays)
        found = jax.jit(ours.apply)(variables, *arrays)
        assert found.dtype == jnp.float32
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()

    def test_bf16_is_no_worse_than_torchs_own(self, pair):
        ours, variables, theirs, arrays = pair
        exact = torch_velocity(theirs, *arrays)
        low = MMDiT(ours.config, dtype=jnp.bfloat16)
        found = np.asarray(jax.jit(low.apply)(variables, *arrays))
        half = torch_velocity(copy.deepcopy(theirs).to(torch.bfloat16), *arrays)
        assert np.abs(found - exact).mean() < 2 * np.abs(half - exact).mean()

    @pytest.mark.parametrize("pair", ["sd3, not square, odd number of tokens"], indirect=True)
    def test_gradient_by_the_latents(self, pair):
        ours, variables, theirs, (x, timestep, tokens, pooled) = pair

        @jax.jit
        def gradient(x):
            return jax.grad(
                lambda x: (ours.apply(variables, x, timestep, tokens, pooled) ** 2).sum()
            )(x)

        found = gradient(x)
        latents = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
        out = theirs(
            hidden_states=latents,
            timestep=torch.from_numpy(timestep),
            encoder_hidden_states=torch.from_numpy(tokens),
            pooled_projections=torch.from_numpy(pooled),
        ).sample
        (out**2).sum().backward()
        expected = latents.grad.permute(0, 2, 3, 1).numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()

    def test_parameters_and_round_trip(self, pair):
        _, variables, theirs, _ = pair
        assert count_parameters(variables) == sum(p.numel() for p in theirs.parameters())
        back, state = to_torch(variables), theirs.state_dict()
        assert set(back) == set(state)
        for name, tensor in state.items():
            np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)

    def test_position_table(self, pair):
        ours, _, theirs, _ = pair
        c = ours.config
        table = sincos_position_table(
            c.inner_dim, c.pos_embed_max_size, c.sample_size // c.patch_size
        )
        np.testing.assert_allclose(table, theirs.pos_embed.pos_embed.numpy(), atol=1e-6)


# The published models: name -> (parameters, transformer/config.json where it is not the default).
PUBLISHED = {
    "sd3 medium": (
        2_028_328_000,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "sd3.5 medium": (
        2_243_171_520,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "sd3.5 large": (
        8_056_627_520,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_at_full_size(name):
    """Count, names and shapes, without the memory."""
    parameters, config = PUBLISHED[name]
    count, ours, theirs = full_size_names(
        StableDiffusion3.transformer_network.shapes(MMDiT(MMDiTConfig.from_dict(config))),
        diffusers.SD3Transformer2DModel,
        **config,
    )
    assert count == parameters
    assert ours == theirs


@pytest.fixture(scope="module")
def model():
    config = MMDiTConfig.from_dict(SD35)
    module = MMDiT(config)
    arrays = inputs(SD35, 8, 8, 5)
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), *arrays))
    return module, jax.jit(module.apply), variables, arrays


def perturbed(variables):
    """A trained network has no zeros: adaLN-Zero starts with every branch closed."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype(np.float32), variables
    )


class TestNetwork:
    def test_a_new_network_predicts_zero(self, model):
        _, apply, variables, arrays = model
        assert (np.asarray(apply(variables, *arrays)) == 0).all()

    def test_runs_are_scanned_and_named(self, model):
        _, _, variables, _ = model
        names = {n for n in variables["params"] if n.startswith("transformer_blocks")}
        assert names == {f"transformer_blocks.{run}" for run in ("0:2", "2:3", "3:4")}
        kernel = variables["params"]["transformer_blocks.0:2"]["attn2"]["to_q"]["kernel"]
        assert kernel.shape == (2, 48, 48)
        assert set(variables["buffers"]) == {"pos_embed"}

    def test_remat_changes_nothing(self):
        config = MMDiTConfig.from_dict(SD35 | {"num_layers": 2, "dual_attention_layers": (0,)})
        arrays = inputs(SD35, 4, 4, 3)
        variables = perturbed(nn.unbox(jax.jit(MMDiT(config).init)(jax.random.key(0), *arrays)))
        gradients = []
        for remat in ("none", "full", "attention"):
            network = MMDiT(config, remat=remat)
            gradients.append(
                jax.jit(jax.grad(lambda v, n=network: (n.apply(v, *arrays) ** 2).mean()))(variables)
            )
        for other in gradients[1:]:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients[0], other
            )

    def test_what_is_kept_is_not_computed_again(self):
        config = MMDiTConfig.from_dict(SD35 | {"num_layers": 3, "dual_attention_layers": (0,)})
        arrays = inputs(SD35, 4, 4, 3)
        variables = nn.unbox(jax.eval_shape(MMDiT(config).init, jax.random.key(0), *arrays))

        def operations(remat):
            """Of the gradient for a part of attention, as a LoRA's: gates have none."""
            network = MMDiT(config, remat=remat)

            def loss(kernel, variables):
                params = {**variables["params"]}
                block = params["transformer_blocks.0:1"]
                attn = {**block["attn"], "to_q": {**block["attn"]["to_q"], "kernel": kernel}}
                params["transformer_blocks.0:1"] = {**block, "attn": attn}
                return network.apply({**variables, "params": params}, *arrays).sum()

            block = variables["params"]["transformer_blocks.0:1"]
            return flops.count(jax.grad(loss), block["attn"]["to_q"]["kernel"], variables)

        none, dots, attention, full = map(operations, ("none", "dots", "attention", "full"))
        assert none <= dots < attention < full

    def test_bf16_is_close_and_parameters_stay_fp32(self, model):
        module, apply, variables, arrays = model
        variables = perturbed(variables)
        low = MMDiT(module.config, dtype=jnp.bfloat16)
        expected = np.asarray(apply(variables, *arrays))
        found = np.asarray(jax.jit(low.apply)(variables, *arrays))
        assert found.dtype == np.float32  # as the latents given
        assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
        for leaf in jax.tree.leaves(jax.eval_shape(low.init, jax.random.key(0), *arrays)):
            assert leaf.dtype == jnp.float32

    def test_samples_of_a_batch_are_independent(self, model):
        _, apply, variables, arrays = model
        variables = perturbed(variables)
        together = apply(variables, *arrays)
        alone = apply(variables, *(a[1:] for a in arrays))
        np.testing.assert_allclose(together[1:], alone, atol=1e-5)

    def test_logical_axes_reach_every_parameter(self, model):
        module, _, _, arrays = model
        specs = nn.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), *arrays))
        flat = jax.tree.leaves_with_path(
            specs["params"], is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec)
        )
        assert all(len(spec) > 0 for _, spec in flat)
        to_q = specs["params"]["transformer_blocks.0:2"]["attn"]["to_q"]["kernel"]
        assert tuple(to_q) == ("layers", "embed", "heads")


class TestClearErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
            ({"caption_projection_dim": 40}, "caption_projection_dim 40"),
            ({"rope_theta": 10000}, "'rope_theta'.*10000"),
            ({"dual_attention_layers": [0, 9]}, r"dual_attention_layers \[9\]"),
            ({"num_layers": 0}, "num_layers 0"),
            ({"num_layers": 10**9}, "num_layers 1000000000"),
            ({"attention_head_dim": 3, "num_attention_heads": 2, "caption_projection_dim": 6}, "4"),
        ],
    )
    def test_config(self, change, message):
        with pytest.raises(ValueError, match=message):
            MMDiTConfig.from_dict(SD35 | change)

    def test_notes_are_passed_over_and_defaults_are_those_of_diffusers(self):
        config = MMDiTConfig.from_dict({"_class_name": "x", "_diffusers_version": "0.1"})
        signature = inspect.signature(diffusers.SD3Transformer2DModel.__init__)
        theirs = {name: p.default for name, p in signature.parameters.items() if name != "self"}
        assert dataclasses.asdict(config) == theirs

    @pytest.mark.parametrize(
        ("position", "shape", "message"),
        [
            (0, (2, 7, 8, 4), "multiples of 2"),
            (0, (2, 8, 8, 3), r"\[N, h, w, 4\]"),
            (0, (2, 26, 8, 4), "pos_embed_max_size 12"),
            (2, (2, 5, 39), "39 wide.*40"),
            (3, (2, 23), "23 wide.*24"),
        ],
    )
    def test_inputs(self, model, position, shape, message):
        module, _, variables, arrays = model
        arrays = list(arrays)
        arrays[position] = np.zeros(shape, np.float32)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.apply, variables, *arrays)
