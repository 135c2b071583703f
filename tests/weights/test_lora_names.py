"""Foreign names of LoRA files against the loaders and converters of diffusers."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from pec_jax.families.networks import load_module
from pec_jax.families.pipeline import load_transformer
from pec_jax.families.registry import FAMILIES, named_family, transformer_network
from pec_jax.io import write_json
from pec_jax.models import lora
from pec_jax.weights import lora_names
from pec_jax.weights.lora_reader import read_lora
from pec_jax.weights.tensors import WeightsError
from tests.weights import lora_oracles as oracles

D = 32  # width of the tiny FLUX
WIDE, MLP = 3072, 12288  # widths that diffusers' converters have written into them
RANK = 2
# A layer of FLUX.1's own code, with its widths in units of D; those of one block each.
DOUBLE = {
    "img_attn.qkv": (1, 3),
    "txt_attn.qkv": (1, 3),
    "img_attn.proj": (1, 1),
    "txt_attn.proj": (1, 1),
    "img_mlp.0": (1, 4),
    "img_mlp.2": (4, 1),
    "txt_mlp.0": (1, 4),
    "txt_mlp.2": (4, 1),
    "img_mod.lin": (1, 6),
    "txt_mod.lin": (1, 6),
}
SINGLE = {"linear1": (1, 7), "linear2": (5, 1), "modulation.lin": (1, 3)}


def block_modules(width, double=(0, 1), single=(0, 1)):
    """Module in FLUX.1's own code -> (in, out)."""
    blocks = [(f"double_blocks.{i}.{n}", w) for i in double for n, w in DOUBLE.items()]
    blocks += [(f"single_blocks.{i}.{n}", w) for i in single for n, w in SINGLE.items()]
    return {name: (width * fan_in, width * fan_out) for name, (fan_in, fan_out) in blocks}


def kohya(name):
    return f"lora_unet_{name.replace('.', '_')}"


def comfy(name):
    return f"diffusion_model.{name}"


def save(path, factors, module=lambda n: n, parts=("lora_down", "lora_up"), alpha=None):
    """A file of factors under some program's names."""
    tensors = {}
    for i, (name, (a, b)) in enumerate(factors.items()):
        tensors |= {f"{module(name)}.{parts[0]}.weight": a, f"{module(name)}.{parts[1]}.weight": b}
        if alpha is not None:
            tensors[f"{module(name)}.alpha"] = torch.tensor(alpha + i % 3)
    save_file({n: v.contiguous() for n, v in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return oracles.write(tmp_path_factory.mktemp("flux"), "flux")


@pytest.fixture(scope="module")
def base(flux):
    return oracles.numbers(oracles.model(flux, "flux"))


def check(flux, base, path):
    expected = oracles.of_diffusers(flux, "flux", path)
    oracles.assert_merged(oracles.ours(flux, path), expected, base)


class TestTinyFlux:
    """What the loader of diffusers takes at any width."""

    @pytest.mark.parametrize("alpha", [None, 1.0, 3.5])
    @pytest.mark.parametrize("module", [kohya, comfy])
    def test_kohya_and_comfyui(self, tmp_path, flux, base, module, alpha):
        modules = block_modules(D, single=())
        path = save(tmp_path / "x.safetensors", oracles.factors(modules), module, alpha=alpha)
        check(flux, base, path)

    def test_a_low_rank_for_each_of_query_key_and_value(self, tmp_path, flux, base):
        """Of which diffusers makes three of a third of the rank."""
        name = "double_blocks.0.img_attn.qkv"
        (a, b) = oracles.factors({name: (D, 3 * D)}, rank=6)[name]
        for i in range(3):
            b[: i * D, 2 * i : 2 * i + 2] = 0
            b[(i + 1) * D :, 2 * i : 2 * i + 2] = 0
        path = save(tmp_path / "x.safetensors", {name: (a, b)}, kohya, alpha=2.0)
        check(flux, base, path)

    @pytest.mark.parametrize("prefix", ["", "diffusion_model."])
    def test_xlabs(self, tmp_path, flux, base, prefix):
        modules = {}
        for i in (0, 1):
            for stream in (1, 2):
                modules[f"{prefix}double_blocks.{i}.processor.qkv_lora{stream}"] = (D, 3 * D)
                modules[f"{prefix}double_blocks.{i}.processor.proj_lora{stream}"] = (D, D)
            modules[f"{prefix}single_blocks.{i}.processor.qkv_lora"] = (D, 3 * D)
            modules[f"{prefix}single_blocks.{i}.processor.proj_lora"] = (5 * D, D)
        path = save(tmp_path / "x.safetensors", oracles.factors(modules), parts=("down", "up"))
        check(flux, base, path)

    def test_onetrainer(self, tmp_path, flux, base):
        names = [
            *(f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_out.0", "add_k_proj")),
            "single_transformer_blocks.1.attn.to_v",
            "context_embedder",
            "proj_out",
            "time_text_embed.timestep_embedder.linear_1",
        ]
        modules = {name: base[f"{name}.weight"].shape[::-1] for name in names}
        path = save(
            tmp_path / "x.safetensors",
            oracles.factors(modules),
            lambda n: f"lora_transformer_{n.replace('.', '_')}",
            alpha=1.0,
        )
        check(flux, base, path)

    def test_alpha_beside_new_names(self, tmp_path, flux, base):
        modules = dict.fromkeys(
            [f"transformer.transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")], (D, D)
        )
        factors = oracles.factors(modules)
        path = save(tmp_path / "x.safetensors", factors, parts=("lora_A", "lora_B"), alpha=1.0)
        check(flux, base, path)

    def test_two_names_of_one_layer(self, tmp_path, flux):
        modules = {
            "lora_unet_double_blocks_0_img_attn_qkv": (D, 3 * D),
            "transformer.transformer_blocks.0.attn.to_k": (D, D),
        }
        path = save(tmp_path / "x.safetensors", oracles.factors(modules))
        with pytest.raises(WeightsError, match=r"adapts 'transformer_blocks\.0\.attn\.to_k' twice"):
            oracles.ours(flux, path)

    @pytest.mark.parametrize(
        "name",
        ["lora_unet_double_blocks_7_img_mlp_0", "lora_unet_down_blocks_0_x", "joint_blocks.0.x"],
    )
    def test_modules_of_other_models(self, tmp_path, flux, name):
        path = save(tmp_path / "x.safetensors", oracles.factors({name: (D, D)}))
        with pytest.raises(WeightsError, match=r"does not have, .*another model"):
            oracles.ours(flux, path)


def shapes(directory, config):
    """A transformer's parameters as shapes, without weights."""
    write_json(directory / "config.json", config)
    return load_transformer(directory, weights=False)[1]["params"]


@pytest.fixture(scope="module")
def wide_flux(tmp_path_factory):
    """FLUX.1-dev's widths, with as many blocks as diffusers' converters ask for."""
    family = named_family("flux")
    config = copy.deepcopy(next(iter(family.published.values()))["transformer/config.json"])
    return shapes(tmp_path_factory.mktemp("wide"), config)


def rows(adapter, params):
    """Layer -> (a [in, r], b [r, out])."""
    found = {}
    for path, names in lora.linear_layers(params).items():
        leaf = adapter.factors
        for part in path:
            leaf = leaf.get(part, {})
        if leaf:
            pairs = zip(leaf["a"], leaf["b"]) if leaf["a"].ndim == 3 else [(leaf["a"], leaf["b"])]
            found |= zip(names, pairs)
    return {name: pair for name, pair in found.items() if pair[0].any()}


def assert_same_products(found, expected, sample=64):
    """Products of factors, compared in some rows and columns."""
    assert found.keys() == expected.keys()
    for name, (a, b) in expected.items():
        ours_a, ours_b = found[name]
        step_in, step_out = max(1, a.shape[1] // sample), max(1, b.shape[0] // sample)
        expected_part = (b[::step_out] @ a[:, ::step_in]).numpy()
        found_part = (ours_a[::step_in] @ ours_b[:, ::step_out]).T
        np.testing.assert_allclose(found_part, expected_part, atol=1e-5, rtol=1e-4, err_msg=name)


def halves(state):
    """Module -> (A, B) of a state dict that diffusers has converted."""
    suffix = ".lora_A.weight"
    return {
        name.removesuffix(suffix).removeprefix("transformer."): (
            value,
            state[name.replace("lora_A", "lora_B")],
        )
        for name, value in state.items()
        if name.endswith(suffix)
    }


class TestWideFlux:
    """Layers that diffusers converts at the width of the published model alone."""

    def test_kohya(self, tmp_path, wide_flux):
        factors = oracles.factors(block_modules(WIDE, double=(0,), single=(3,)))
        path = save(tmp_path / "x.safetensors", factors, kohya, alpha=1.0)
        expected = halves(diffusers.FluxPipeline.lora_state_dict(str(path)))
        assert_same_products(rows(read_lora(path, wide_flux), wide_flux), expected)

    def test_the_models_own_names_behind_the_prefix_of_peft(self, tmp_path, wide_flux):
        """As fal's trainer writes them, for all blocks; there is no adapter_config.json."""
        modules = block_modules(WIDE, range(19), range(38)) | {"final_layer.linear": (WIDE, 64)}
        factors = oracles.factors(modules, rank=1)
        halves_of_peft = ("lora_A", "lora_B")
        path = save(
            tmp_path / "x.safetensors", factors, lambda n: f"base_model.model.{n}", halves_of_peft
        )
        expected = halves(diffusers.FluxPipeline.lora_state_dict(str(path)))
        assert_same_products(rows(read_lora(path, wide_flux), wide_flux), expected)

    def test_every_layer_as_in_the_converted_model(self, tmp_path, wide_flux):
        """B of each layer taken for its weight, and converted as the model's own files are."""
        others = {
            "img_in": (64, WIDE),
            "txt_in": (4096, WIDE),
            "final_layer.linear": (WIDE, 64),
            "final_layer.adaLN_modulation.1": (WIDE, 2 * WIDE),
            "time_in.in_layer": (256, WIDE),
            "vector_in.in_layer": (768, WIDE),
            "guidance_in.in_layer": (256, WIDE),
            **{f"{n}_in.out_layer": (WIDE, WIDE) for n in ("time", "vector", "guidance")},
        }
        factors = oracles.factors(block_modules(WIDE, (0,), (0,)) | others)
        places = [f"double_blocks.0.{stream}_attn" for stream in ("img", "txt")]
        places += ["single_blocks.0"]
        norms = [f"{place}.norm.{n}_norm" for place in places for n in ("query", "key")]
        checkpoint = weights_of(factors) | {f"{n}.scale": torch.ones(1) for n in norms}
        expected = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
        path = save(tmp_path / "x.safetensors", factors, comfy, ("lora_A", "lora_B"))
        assert_same_rows(rows(read_lora(path, wide_flux), wide_flux), expected)


def weights_of(factors):
    """A checkpoint with B for each weight."""
    found = {f"{name}.weight": b for name, (_, b) in factors.items()}
    return found | {f"{name}.bias": b[:, 0] for name, (_, b) in factors.items()}


def assert_same_rows(found, expected):
    layers = {name.removesuffix(".weight") for name in expected if name.endswith(".weight")}
    layers = {name for name in layers if "norm_" not in name.rsplit(".", 1)[-1]}
    assert set(found) == {name for name in layers if name != "pos_embed.proj"}
    for name, (_, b) in found.items():
        np.testing.assert_array_equal(b.T, expected[f"{name}.weight"].numpy(), err_msg=name)


@pytest.mark.parametrize("module", [kohya, comfy])
def test_sd3_as_in_the_converted_model(tmp_path, module):
    """The names of SD3.5's own code, which diffusers reads in whole models, though not in LoRAs."""
    d, joint, pooled = 32, 16, 16
    config = {
        "_class_name": "SD3Transformer2DModel",
        **named_family("sd3").tiny,
        "num_layers": 3,
        "dual_attention_layers": [0, 1],
        "num_attention_heads": 4,
        "attention_head_dim": d // 4,
        "caption_projection_dim": d,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
    }
    params = shapes(tmp_path, config)
    widths = {"context_embedder": (joint, d), "final_layer.adaLN_modulation.1": (d, 2 * d)}
    widths |= {"t_embedder.mlp.0": (256, d), "y_embedder.mlp.0": (pooled, d)}
    widths |= {"t_embedder.mlp.2": (d, d), "y_embedder.mlp.2": (d, d)}
    out = params["proj_out"]["kernel"].shape[-1]
    widths["final_layer.linear"] = (d, out)
    for i in range(3):
        last, dual = i == 2, i in config["dual_attention_layers"]
        for side in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{side}"
            short = last and side == "context_block"
            chunks = 2 if short else 9 if dual and side == "x_block" else 6
            widths[f"{block}.attn.qkv"] = (d, 3 * d)
            widths[f"{block}.adaLN_modulation.1"] = (d, chunks * d)
            if not short:
                widths[f"{block}.attn.proj"] = (d, d)
                widths |= {f"{block}.mlp.fc1": (d, 4 * d), f"{block}.mlp.fc2": (4 * d, d)}
        if dual:
            widths[f"joint_blocks.{i}.x_block.attn2.qkv"] = (d, 3 * d)
            widths[f"joint_blocks.{i}.x_block.attn2.proj"] = (d, d)
    factors = oracles.factors(widths)
    checkpoint = weights_of(factors) | {
        "pos_embed": torch.ones(1),
        "x_embedder.proj.weight": torch.ones(1),
        "x_embedder.proj.bias": torch.ones(1),
    }
    expected = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    path = save(tmp_path / "x.safetensors", factors, module)
    assert_same_rows(rows(read_lora(path, params), params), expected)


def test_every_layer_of_every_family_is_found_by_its_flat_name(tmp_path):
    for family in FAMILIES:
        config = {"_class_name": family.transformer_network.class_name, **family.tiny}
        write_json(tmp_path / "config.json", config)
        network = transformer_network(tmp_path)
        layers = lora.linear_layers(network.shapes(load_module(network, tmp_path))["params"])
        names = [name for run in layers.values() for name in run]
        found = lora_names.Layers(dict.fromkeys(names, (1, 1)))
        for name in names:
            flat = lora_names.parse(f"lora_unet_{name.replace('.', '_')}.lora_down.weight")
            assert [layer.name for layer in found.find(flat[0])] == [name]
