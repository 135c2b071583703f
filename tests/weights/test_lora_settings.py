"""Settings of PEFT's adapters: its result exactly, or a refusal by name."""

from __future__ import annotations

import json
import logging

import peft
import pytest
import torch
from safetensors.torch import save_file

from pec_jax.weights.lora_reader import read_lora
from pec_jax.weights.tensors import WeightsError
from tests.weights import lora_oracles as oracles

LAYERS = oracles.LAYERS
SETTINGS = {"r": 2, "lora_alpha": 6, "target_modules": list(LAYERS)}


# What leaves the network's weights alone, and settings that PEFT fills in or does not look at.
@pytest.mark.parametrize(
    "changes",
    [
        *({"init_lora_weights": name} for name in (None, True, False, "gaussian", "Gaussian")),
        *({"init_lora_weights": name} for name in ("eva", "orthogonal", "mica")),
        {"lora_alpha": ...},
        {"use_rslora": True},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"target_modules": ["to_q", "transformer_blocks.1.attn.to_k", "to_v"]},
        {"target_modules": r".*\.attn\.to_[qk]"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_as_peft_loads_it(tmp_path, directory, base, tensors, changes):
    settings = {k: v for k, v in (SETTINGS | changes).items() if v is not ...}
    path = oracles.save_peft(tmp_path, tensors, settings)
    oracles.assert_merged(
        oracles.ours(directory, path), oracles.of_peft(directory, "sd3", path), base
    )


@pytest.mark.filterwarnings("ignore")
def test_peft_leaves_lying_what_its_settings_do_not_name(
    tmp_path, directory, base, tensors, caplog
):
    path = oracles.save_peft(tmp_path, tensors, SETTINGS | {"target_modules": ["to_q"]})
    caplog.set_level(logging.WARNING)
    found = oracles.ours(directory, path)
    oracles.assert_merged(found, oracles.of_peft(directory, "sd3", path), base)
    assert f"target_modules does not name '{LAYERS[1]}'" in caplog.text
    path = oracles.save_peft(tmp_path, tensors, SETTINGS | {"target_modules": ["to_x"]})
    with pytest.raises(WeightsError, match="target_modules names no module of the file"):
        oracles.ours(directory, path)


REFUSED = {
    "init_lora_weights": (
        *("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "true", 3),
    ),
    "use_dora": (True,),
    "bias": ("all", "lora_only"),
    "peft_type": ("LOHA", "ADALORA"),
    "modules_to_save": (["proj_out"],),
    "use_qalora": (True,),
    "velora_config": ({"groups": 2},),
    "alora_invocation_tokens": ([1],),
    "target_parameters": (["a"],),
    "layer_replication": ([[0, 2]],),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in REFUSED.items() for v in vs])
@pytest.mark.parametrize("header", [True, False])
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, base, tensors, key, value, header):
    settings = SETTINGS | {key: value}
    params = {"x": {"kernel": base["proj_out.weight"]}}
    if header:
        path = tmp_path / "lora.safetensors"
        text = json.dumps({f"transformer.{k}": v for k, v in settings.items()})
        save_file(tensors, path, {"lora_adapter_metadata": text})
    else:
        path = oracles.save_peft(tmp_path, tensors, settings)
    with pytest.raises(WeightsError, match=key) as error:
        read_lora(path, params)
    assert str(tmp_path) in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_magnitudes_without_use_dora(tmp_path, directory, tensors):
    width = tensors[f"{LAYERS[0]}.lora_A.weight"].shape[1]
    more = {f"{LAYERS[0]}.lora_magnitude_vector": torch.ones(width)}
    path = oracles.save_peft(tmp_path, tensors | more, SETTINGS)
    with pytest.raises(WeightsError, match=r"adapter_config\.json: use_dora is not set"):
        oracles.ours(directory, path)
    path = oracles.save_peft(tmp_path, tensors | more, SETTINGS | {"use_dora": True})
    with pytest.raises(WeightsError, match=f"{LAYERS[1]}' lacks the lora_magnitude_vector"):
        oracles.ours(directory, path)


@pytest.mark.filterwarnings("ignore")
class TestAdvice:
    """What the message says to do with a LoRA of changed weights, done."""

    @pytest.fixture(params=["pissa", "olora"])
    def trained(self, request, directory):
        """A torch model with an adapter that started so, and was trained on."""
        model = oracles.model(directory, "sd3")
        settings = SETTINGS | {"init_lora_weights": request.param}
        model.add_adapter(peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1.5)
        return model

    def check(self, directory, model, merged):
        for module in LAYERS:
            layer = model.get_submodule(module)
            expected = layer.base_layer.weight + layer.get_delta_weight("default")
            found = merged.get_submodule(module).weight
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def test_of_peft(self, tmp_path, directory, trained):
        state = peft.get_peft_model_state_dict(trained, adapter_name="default")
        settings = trained.peft_config["default"].to_dict()
        settings["target_modules"] = list(settings["target_modules"])
        path = oracles.save_peft(tmp_path / "lora", state, settings)
        with pytest.raises(WeightsError, match=r"from_pretrained.*merge_and_unload") as error:
            oracles.ours(directory, path)
        code = str(error.value).split("transformer: ")[1]
        names = {
            "peft": peft,
            "transformer": oracles.model(directory, "sd3"),
            "DIRECTORY": tmp_path / "merged",
        }
        exec(code, names)
        self.check(directory, trained, oracles.model(tmp_path / "merged", "sd3"))

    def test_of_diffusers(self, tmp_path, directory, trained):
        trained.save_lora_adapter(tmp_path / "lora")
        file = next((tmp_path / "lora").iterdir())
        with pytest.raises(WeightsError, match=r"load_lora_weights.*save_pretrained") as error:
            oracles.ours(directory, file)
        code = str(error.value).split("transformer: ")[1]
        # A file for the pipeline has "transformer." before every name.
        from safetensors import safe_open
        from safetensors.torch import load_file

        with safe_open(file, "pt") as handle:
            text = json.loads(handle.metadata()["lora_adapter_metadata"])
        text = json.dumps({f"transformer.{k}": v for k, v in text.items()})
        named = {f"transformer.{k}": v for k, v in load_file(file).items()}
        save_file(named, file, {"format": "pt", "lora_adapter_metadata": text})
        pipe = oracles.pipeline(directory, "sd3")
        exec(code, {"pipe": pipe, "DIRECTORY": tmp_path / "merged"})
        self.check(directory, trained, oracles.model(tmp_path / "merged", "sd3"))
