"""The autoencoder against diffusers' AutoencoderKL, at its own tensor names."""

from __future__ import annotations

import dataclasses
import inspect

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pec_jax.families.networks import AUTOENCODER_KL
from pec_jax.models.vae import AutoencoderKL, VAEConfig, scale_latents, unscale_latents
from pec_jax.weights.convert import count_parameters, from_torch, to_torch


def config_of(channels: tuple[int, ...], **changes) -> dict:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": 4,
        **changes,
    }


# Name -> (config, image height, image width).
CASES = {
    "as SD3: no quant convs, shift": (
        config_of(
            (8, 16, 16),
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ),
        16,
        24,
    ),
    "as SD1: quant convs, two layers": (
        config_of((8, 8), latent_channels=3, layers_per_block=2),
        14,
        10,
    ),
    "one level, no attention, one quant conv": (
        config_of((12,), mid_block_add_attention=False, use_quant_conv=False, norm_num_groups=3),
        5,
        7,
    ),
}


@pytest.fixture(scope="module", params=list(CASES), ids=list(CASES))
def pair(request):
    """(our network, its variables, diffusers' network, images)."""
    config, height, width = CASES[request.param]
    theirs = diffusers.AutoencoderKL(**config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p[0].numel() ** 0.5 if p.ndim > 1 else 0.5 + 0.3 * noise)
    theirs.eval()
    ours = AutoencoderKL(VAEConfig.from_dict(dict(theirs.config)))
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    variables = from_torch(state, AUTOENCODER_KL.shapes(ours))
    images = np.random.default_rng(0).uniform(-1, 1, size=(2, height, width, 3))
    return ours, variables, theirs, images.astype(np.float32)


def to_nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


class TestDiffusersAgrees:
    def test_encode(self, pair):
        ours, variables, theirs, images = pair
        mean, logvar = jax.jit(lambda v, x: ours.apply(v, x, method="encode"))(variables, images)
        with torch.no_grad():
            posterior = theirs.encode(to_nchw(images)).latent_dist
        assert np.abs(mean - nhwc(posterior.mean)).max() < 1e-4 * posterior.mean.std()
        assert np.abs(logvar - nhwc(posterior.logvar)).max() < 1e-4 * posterior.logvar.std()

    def test_decode(self, pair):
        ours, variables, theirs, images = pair
        factor, channels = ours.config.scale_factor, ours.config.latent_channels
        shape = (2, images.shape[1] // factor, images.shape[2] // factor, channels)
        latents = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        with torch.no_grad():
            expected = nhwc(theirs.decode(to_nchw(latents)).sample)
        found = jax.jit(lambda v, z: ours.apply(v, z, method="decode"))(variables, latents)
        assert found.shape == expected.shape == images.shape
        assert np.abs(found - expected).max() < 1e-4 * expected.std()

    def test_parameters_and_round_trip(self, pair):
        _, variables, theirs, _ = pair
        assert count_parameters(variables) == sum(p.numel() for p in theirs.parameters())
        back, state = to_torch(variables), theirs.state_dict()
        assert set(back) == set(state)
        for name, tensor in state.items():
            np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)

    def test_scale_factor(self, pair):
        ours, _, theirs, _ = pair
        assert ours.config.scale_factor == 2 ** (len(theirs.config.block_out_channels) - 1)


@pytest.fixture(scope="module")
def small():
    module = AutoencoderKL(VAEConfig.from_dict(config_of((4, 8), latent_channels=2)))
    images = jnp.zeros((1, 4, 4, 3))
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(0), images))


def run(module, variables, x, method=None):
    return jax.jit(lambda v, x: module.apply(v, x, method=method))(variables, x)


class TestNetwork:
    def test_init_makes_the_parameters_of_both_halves(self, small):
        _, variables = small
        assert set(variables["params"]) == {"encoder", "decoder", "quant_conv", "post_quant_conv"}

    def test_reconstruction_is_decode_of_the_mean(self, small):
        module, variables = small
        images = jax.random.uniform(jax.random.key(1), (2, 8, 4, 3))
        mean, _ = run(module, variables, images, method="encode")
        expected = run(module, variables, mean, method="decode")
        np.testing.assert_allclose(run(module, variables, images), expected, atol=1e-5)

    def test_log_variance_is_clipped(self, small):
        module, variables = small
        variables = jax.tree.map(lambda a: 1e3 * np.asarray(a), variables)
        images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
        _, logvar = run(module, variables, images, method="encode")
        assert logvar.min() == -30.0 or logvar.max() == 20.0
        assert logvar.min() >= -30.0 and logvar.max() <= 20.0

    def test_bf16_is_close_and_comes_back_in_fp32(self, small):
        module, variables = small
        low = AutoencoderKL(module.config, dtype=jnp.bfloat16)
        latents = jax.random.normal(jax.random.key(1), (2, 4, 4, 2))
        expected = run(module, variables, latents, method="decode")
        found = run(low, variables, latents, method="decode")
        assert found.dtype == jnp.float32
        assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_scaling_is_that_of_sd3_and_inverts():
    config = VAEConfig(scaling_factor=1.5305, shift_factor=0.0609)
    z = np.linspace(-3, 3, 7)
    np.testing.assert_allclose(scale_latents(config, z), (z - 0.0609) * 1.5305)
    np.testing.assert_allclose(unscale_latents(config, scale_latents(config, z)), z)


class TestClearErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"act_fn": "relu"}, "act_fn 'relu'"),
            ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types.*Attn"),
            ({"latents_mean": [0.0]}, r"latents_mean \[0.0\]"),
            ({"norm_num_groups": 5}, "norm_num_groups 5"),
            ({"time_embedding": 1}, "'time_embedding'"),
            ({"latent_channels": 0}, "latent_channels 0"),
            ({"scaling_factor": 0.0}, "scaling_factor"),
            ({"layers_per_block": 10**6}, "layers_per_block 1000000"),
            ({"block_out_channels": []}, "block_out_channels"),
        ],
    )
    def test_config(self, change, message):
        config = config_of((4, 8)) | change
        if change == {"block_out_channels": []}:
            config |= {"down_block_types": [], "up_block_types": []}
        with pytest.raises(ValueError, match=message):
            VAEConfig.from_dict(config)

    def test_missing_shift_is_none(self):
        assert VAEConfig.from_dict(config_of((4, 8), shift_factor=None)).shift_factor == 0.0

    def test_defaults_are_those_of_diffusers(self):
        signature = inspect.signature(diffusers.AutoencoderKL.__init__)
        theirs = {name: p.default for name, p in signature.parameters.items()}
        ours = dataclasses.asdict(VAEConfig())
        assert {k: v for k, v in ours.items() if k != "shift_factor"} == {
            k: theirs[k] for k in ours if k != "shift_factor"
        }

    def test_image_size_that_does_not_divide(self, small):
        module, variables = small
        with pytest.raises(ValueError, match=r"5 x 4 pixels.*multiples of 2"):
            run(module, variables, jnp.zeros((1, 5, 4, 3)), "encode")
