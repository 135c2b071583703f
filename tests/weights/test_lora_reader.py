"""LoRA files of every kind against PEFT and diffusers, by the weights that come of them."""

from __future__ import annotations

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from pec_jax.families.pipeline import load_transformer
from pec_jax.models import lora
from pec_jax.weights.lora_reader import read_lora
from pec_jax.weights.tensors import WeightsError
from tests.weights import lora_oracles as oracles

Q, K = oracles.LAYERS
SEVERAL = ["to_q", "to_k", "net.0.proj", "norm1.linear", "proj_out"]


def save(path, tensors, rename=lambda name: f"transformer.{name}"):
    named = {rename(name): value.contiguous() for name, value in tensors.items()}
    save_file(named, path, {"format": "pt"})
    return path


KINDS = {
    "dora": {"use_dora": True},
    "dora, several ranks": {"use_dora": True, "rank_pattern": {"to_k": 2}, "lora_alpha": 3},
    "dora, some layers of a run": {"use_dora": True, "target_modules": [Q, K, "proj_out"]},
    "lora_bias": {"lora_bias": True},
    "lora_bias, some layers": {"lora_bias": True, "target_modules": [Q], "use_rslora": True},
}


@pytest.mark.filterwarnings("ignore")
class TestMoreThanAProduct:
    @pytest.fixture(params=KINDS)
    def trained(self, request, directory):
        model = oracles.model(directory, "sd3")
        settings = {"r": 3, "lora_alpha": 5, "target_modules": SEVERAL} | KINDS[request.param]
        model.add_adapter(peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_magnitude" in name:
                    value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
                elif "lora_" in name:
                    value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        return model

    def save(self, model, path):
        type(self).pipeline.save_lora_weights(
            path,
            transformer_lora_layers=peft.get_peft_model_state_dict(model, adapter_name="default"),
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )

    pipeline = oracles.PIPELINES["sd3"]

    def test_of_diffusers(self, tmp_path, directory, base, trained):
        self.save(trained, tmp_path)
        expected = oracles.of_diffusers(directory, "sd3", tmp_path)
        oracles.assert_merged(oracles.ours(directory, tmp_path), expected, base)

    def test_of_peft(self, tmp_path, directory, base, trained):
        state = peft.get_peft_model_state_dict(trained, adapter_name="default")
        settings = trained.peft_config["default"].to_dict()
        settings["target_modules"] = list(settings["target_modules"])
        path = oracles.save_peft(tmp_path, state, settings)
        expected = oracles.of_peft(directory, "sd3", path)
        oracles.assert_merged(oracles.ours(directory, path), expected, base)

    def test_a_velocity(self, tmp_path, directory, trained):
        """The adapter at work, not merged: what is beside the weights and what is in them."""
        self.save(trained, tmp_path)
        network, variables = load_transformer(directory)
        config = trained.config
        rng = np.random.default_rng(0)
        size = config.sample_size
        latents, tokens, pooled = (
            rng.normal(size=shape).astype(np.float32)
            for shape in (
                (2, size, size, config.in_channels),
                (2, 5, config.joint_attention_dim),
                (2, config.pooled_projection_dim),
            )
        )
        timestep = np.asarray([900.0, 300.0], np.float32)
        with torch.no_grad():
            expected = trained(
                torch.from_numpy(latents.transpose(0, 3, 1, 2)),
                torch.from_numpy(tokens),
                torch.from_numpy(pooled),
                torch.from_numpy(timestep),
            ).sample.numpy()
        with jax.default_matmul_precision("highest"):
            adapted = lora.attach(variables, read_lora(tmp_path, variables["params"]))
            found, plain = (
                np.transpose(network.apply(v, latents, timestep, tokens, pooled), (0, 3, 1, 2))
                for v in (adapted, variables)
            )
        scale = expected.std()
        assert np.abs(found - expected).max() < 1e-4 * scale < 1e-2 * np.abs(plain - found).max()


def test_a_bias_that_the_layer_lacks(tmp_path, directory, tensors):
    params = load_transformer(directory)[1]["params"]
    run = next(name for name in params if name.startswith("transformer_blocks.0:"))
    del params[run]["attn"]["to_q"]["bias"]
    width = tensors[f"{Q}.lora_A.weight"].shape[1]
    path = save(tmp_path / "x.safetensors", tensors | {f"{Q}.lora_B.bias": torch.ones(width)})
    with pytest.raises(WeightsError, match=f"adapts the bias of '{Q}', which has none"):
        read_lora(path, params)


OLD = {  # of diffusers before PEFT
    "lora_A.weight": "lora.down.weight",
    "lora_B.weight": "lora.up.weight",
}


def processor(name):
    """As attention processors of old kept them."""
    for new, old in OLD.items():
        name = name.replace(f".{new}", f"_{old}")
    return "transformer." + name.replace(".attn.", ".attn.processor.")


def old(name):
    for new, other in OLD.items():
        name = name.replace(new, other)
    return f"transformer.{name}"


def flat(name):
    """As kohya's programs write it."""
    module, half = name.removesuffix(".weight").rsplit(".", 1)
    return (
        f"{module.replace('.', '_')}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[half] }.weight"
    )


class TestSpellings:
    @pytest.mark.parametrize("rename", [lambda n: f"transformer.{n}", old, processor])
    def test_as_diffusers_loads_them(self, tmp_path, directory, base, tensors, rename):
        path = save(tmp_path / "x.safetensors", tensors, rename)
        expected = oracles.of_diffusers(directory, "sd3", path)
        oracles.assert_merged(oracles.ours(directory, path), expected, base)

    @pytest.mark.parametrize(
        "rename",
        [
            lambda n: n,
            lambda n: f"diffusion_model.{n}",
            lambda n: f"module.{n}",
            lambda n: f"_orig_mod.{n}",
            lambda n: f"transformer._orig_mod.{n}",
            lambda n: f"transformer.{n.replace('.attn.', '._orig_mod.attn.')}",
            lambda n: n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
            lambda n: f"lora_transformer_{flat(n)}",
            lambda n: f"lora_unet_{flat(n)}",
        ],
    )
    def test_others(self, tmp_path, directory, tensors, rename):
        plain = save(tmp_path / "plain.safetensors", tensors)
        path = save(tmp_path / "x.safetensors", tensors, rename)
        params = load_transformer(directory)[1]["params"]
        found, expected = read_lora(path, params), read_lora(plain, params)
        assert found.is_plain
        jax.tree.map(np.testing.assert_array_equal, found.factors, expected.factors)

    @pytest.mark.filterwarnings("ignore")
    def test_peft_with_the_name_of_the_adapter(self, tmp_path, directory, base, tensors):
        """As torch's own state dict has it; PEFT reads the same without the name."""
        settings = {"r": 2, "lora_alpha": 6, "target_modules": [Q, K]}
        expected = oracles.of_peft(
            directory, "sd3", oracles.save_peft(tmp_path / "a", tensors, settings)
        )
        named = {
            name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): value
            for name, value in tensors.items()
        }
        path = oracles.save_peft(tmp_path / "b", named, settings)
        oracles.assert_merged(oracles.ours(directory, path), expected, base)


class TestNumbers:
    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
    )
    def test_of_few_bits(self, tmp_path, directory, base, tensors, dtype):
        low = {name: value.to(dtype) for name, value in tensors.items()}
        path = save(tmp_path / "low.safetensors", low)
        exact = {name: value.float() for name, value in low.items()}
        expected = oracles.of_diffusers(
            directory, "sd3", save(tmp_path / "exact.safetensors", exact)
        )
        oracles.assert_merged(oracles.ours(directory, path), expected, base)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_that_are_none(self, tmp_path, directory, tensors, value, dtype):
        bad = f"{K}.lora_B.weight"
        broken = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
        broken[bad][1, 1] = value
        path = save(tmp_path / "x.safetensors", broken)
        with pytest.raises(WeightsError, match=f"x.safetensors: 'transformer.{bad}' holds .* NaN"):
            read_lora(path, load_transformer(directory)[1]["params"])

    @pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.bias", "lora_magnitude_vector"])
    def test_in_each_part(self, tmp_path, directory, tensors, part):
        width = tensors[f"{Q}.lora_A.weight"].shape[1]
        more = dict(tensors)
        if part != "lora_A.weight":
            more |= {f"{module}.{part}": torch.ones(width) for module in (Q, K)}
        more[f"{Q}.{part}"] = torch.full_like(more[f"{Q}.{part}"], float("nan"))
        path = save(tmp_path / "x.safetensors", more)
        with pytest.raises(WeightsError, match=f"{Q}.{part}' holds .* NaN"):
            read_lora(path, load_transformer(directory)[1]["params"])

    def test_beyond_float32(self, tmp_path, directory, tensors):
        wide = {name: value.double() * 1e200 for name, value in tensors.items()}
        path = save(tmp_path / "x.safetensors", wide)
        with pytest.raises(WeightsError, match="infinite"):
            read_lora(path, load_transformer(directory)[1]["params"])


class TestTextEncoders:
    NAMES = ("text_encoder.a.lora_A.weight", "lora_te1_a.lora_up.weight", "lora_te2_a.alpha")

    def test_zeros_do_nothing(self, tmp_path, directory, tensors):
        more = {name: torch.zeros(3) for name in self.NAMES} | {
            "text_encoders.t5xxl.transformer.x.lora_down.weight": torch.zeros(2),
            "transformer.norm_out.norm.diff": torch.zeros(2),
        }
        named = {f"transformer.{name}": value for name, value in tensors.items()}
        path = save(tmp_path / "x.safetensors", named | more, lambda name: name)
        params = load_transformer(directory)[1]["params"]
        expected = read_lora(save(tmp_path / "y.safetensors", tensors), params)
        found = read_lora(path, params)
        jax.tree.map(np.testing.assert_array_equal, found.factors, expected.factors)

    @pytest.mark.parametrize("name", NAMES[:2])
    def test_the_advice(self, tmp_path, directory, tensors, name):
        named = {f"transformer.{n}": value for n, value in tensors.items()}
        path = save(tmp_path / "x.safetensors", named | {name: torch.ones(3)}, lambda n: n)
        params = load_transformer(directory)[1]["params"]
        with pytest.raises(WeightsError, match=f"{name}' adapts a text encoder") as error:
            read_lora(path, params)
        prefixes = tuple(str(error.value).split("'")[3::2])
        assert len(prefixes) == 2
        kept = {n: value for n, value in load_file(path).items() if not n.startswith(prefixes)}
        save_file(kept, path)
        assert read_lora(path, params).is_plain
