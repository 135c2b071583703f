"""FLUX's transformer against diffusers' FluxTransformer2DModel, at its own tensor names."""

from __future__ import annotations

import copy

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pec_jax.families.flux import Flux1
from pec_jax.models import flux
from pec_jax.models.flux import Flux, FluxConfig
from pec_jax.weights.convert import count_parameters, from_torch, to_torch
from tests.models.test_mmdit import full_size_names, perturbed, randomize

DEV = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
# Name -> (config, latent height, latent width, text tokens).
CASES = {
    "dev": (DEV, 8, 8, 12),
    "schnell, not square, odd number of tokens": (DEV | {"guidance_embeds": False}, 10, 6, 7),
    "one layer each, wide": (DEV | {"num_layers": 1, "num_single_layers": 1}, 2, 14, 5),
    "no single layers, first axis unused": (
        DEV | {"num_single_layers": 0, "axes_dims_rope": (0, 8, 8)},
        6,
        4,
        1,
    ),
    "long runs, one big head": (
        DEV
        | {
            "num_layers": 5,
            "num_single_layers": 6,
            "num_attention_heads": 1,
            "attention_head_dim": 40,
            "axes_dims_rope": (8, 16, 16),
        },
        4,
        4,
        3,
    ),
    "more channels, small heads, tall": (
        DEV
        | {
            "in_channels": 64,
            "num_attention_heads": 6,
            "attention_head_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": False,
        },
        18,
        2,
        9,
    ),
}


def inputs(config: dict, height: int, width: int, length: int, batch: int = 2):
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(batch, height, width, config["in_channels"] // 4)),
        1000 * rng.integers(1, 1024, size=(batch,)) / 1024,  # exact after a division by 1000
        rng.normal(size=(batch, length, config["joint_attention_dim"])),
        rng.normal(size=(batch, config["pooled_projection_dim"])),
    ]
    if config["guidance_embeds"]:
        arrays.append(250.0 * rng.integers(4, 20, size=(batch,)))
    return tuple(a.astype(np.float32) for a in arrays)


def torch_velocity(model, x, timestep, tokens, pooled, guidance=None) -> np.ndarray:
    """diffusers' velocity in our layout, packed as its pipeline packs."""
    pipeline = diffusers.FluxPipeline
    n, height, width, channels = x.shape
    latents = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    dtype = model.dtype
    with torch.no_grad():
        out = model(
            hidden_states=pipeline._pack_latents(latents, n, channels, height, width).to(dtype),
            timestep=torch.from_numpy(timestep / 1000).to(dtype),
            encoder_hidden_states=torch.from_numpy(tokens).to(dtype),
            pooled_projections=torch.from_numpy(pooled).to(dtype),
            guidance=None if guidance is None else torch.from_numpy(guidance / 1000).to(dtype),
            img_ids=pipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", dtype),
            txt_ids=torch.zeros(tokens.shape[1], 3, dtype=dtype),
        ).sample
    return pipeline._unpack_latents(out, height, width, 1).permute(0, 2, 3, 1).float().numpy()


@pytest.fixture(scope="module", params=list(CASES), ids=list(CASES))
def pair(request):
    """(our network, its variables, diffusers' network, inputs)."""
    config, height, width, length = CASES[request.param]
    theirs = randomize(diffusers.FluxTransformer2DModel(**config))
    ours = Flux(FluxConfig.from_dict(dict(theirs.config)))
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    variables = from_torch(state, Flux1.transformer_network.shapes(ours))
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
        low = Flux(ours.config, dtype=jnp.bfloat16)
        found = np.asarray(jax.jit(low.apply)(variables, *arrays))
        half = torch_velocity(copy.deepcopy(theirs).to(torch.bfloat16), *arrays)
        assert np.abs(found - exact).mean() < 2 * np.abs(half - exact).mean()

    def test_parameters_and_round_trip(self, pair):
        _, variables, theirs, _ = pair
        assert count_parameters(variables) == sum(p.numel() for p in theirs.parameters())
        back, state = to_torch(variables), theirs.state_dict()
        assert set(back) == set(state)
        for name, tensor in state.items():
            np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)


def test_flux_dev_at_full_size():
    """Count, names and shapes of the published model, without its memory."""
    config = FluxConfig(guidance_embeds=True)
    count, ours, theirs = full_size_names(
        _shapes(config), diffusers.FluxTransformer2DModel, guidance_embeds=True
    )
    assert count == 11_901_408_320
    assert ours == theirs


def test_packing_is_diffusers_own():
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype(np.float32)
    latents = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = diffusers.FluxPipeline._pack_latents(latents.contiguous(), 2, 3, 6, 4)
    packed = flux.pack(jnp.asarray(x))
    np.testing.assert_array_equal(packed, expected.numpy())
    np.testing.assert_array_equal(flux.unpack(packed, 6, 4), x)


@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_remat_changes_nothing(remat):
    config = FluxConfig.from_dict(DEV)
    arrays = inputs(DEV, 4, 4, 3)
    variables = perturbed(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), _shapes(config)))

    def gradient(network):
        return jax.jit(jax.grad(lambda v: (network.apply(v, *arrays) ** 2).mean()))(variables)

    plain, again = (gradient(Flux(config, remat=r)) for r in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def _shapes(config: FluxConfig):
    return Flux1.transformer_network.shapes(Flux(config))


class TestClearErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"patch_size": 2}, "patch_size 2"),
            ({"axes_dims_rope": [4, 6, 8]}, "sum to attention_head_dim 16"),
            ({"axes_dims_rope": [3, 7, 6]}, "three even numbers"),
            ({"in_channels": 6}, "in_channels 6"),
            ({"num_layers": 0}, "num_layers 0"),
            ({"num_single_layers": 10**9}, "1000 layers"),
            ({"qk_norm": None}, "'qk_norm'"),
        ],
    )
    def test_config(self, change, message):
        with pytest.raises(ValueError, match=message):
            FluxConfig.from_dict(DEV | change)

    def test_guidance_where_it_does_not_belong(self):
        with_guidance = inputs(DEV, 4, 4, 3)
        dev, schnell = (FluxConfig.from_dict(DEV | {"guidance_embeds": g}) for g in (True, False))
        with pytest.raises(ValueError, match="pass the guidance scale"):
            jax.eval_shape(Flux(dev).apply, _shapes(dev), *with_guidance[:-1])
        with pytest.raises(ValueError, match="pass no guidance scale"):
            jax.eval_shape(Flux(schnell).apply, _shapes(schnell), *with_guidance)

    def test_latents_that_cannot_be_packed(self):
        config = FluxConfig.from_dict(DEV)
        x, *rest = inputs(DEV, 4, 4, 3)
        with pytest.raises(ValueError, match="h and w even"):
            jax.eval_shape(Flux(config).apply, _shapes(config), x[:, :3], *rest)
