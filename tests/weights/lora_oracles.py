"""What tests of LoRA files share: tiny transformers, and their weights with an adapter merged."""

from __future__ import annotations

import json

import diffusers
import jax
import numpy as np
import peft
import torch
from safetensors.torch import save_file

from pec_jax.families.pipeline import load_transformer
from pec_jax.families.registry import named_family
from pec_jax.families.tiny import write_transformer
from pec_jax.models import lora
from pec_jax.weights.convert import to_torch
from pec_jax.weights.lora_reader import read_lora

MODELS = {"sd3": diffusers.SD3Transformer2DModel, "flux": diffusers.FluxTransformer2DModel}
PIPELINES = {"sd3": diffusers.StableDiffusion3Pipeline, "flux": diffusers.FluxPipeline}
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
PARTS = {"sd3": ("vae", *TEXT, "text_encoder_3", "tokenizer_3"), "flux": ("vae", *TEXT)}

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k")  # of one LoRA


def write(directory, family):
    """A tiny random transformer of a family."""
    kind = named_family(family)
    config = {"_class_name": kind.transformer_network.class_name, **kind.tiny}
    write_transformer(directory, config)
    return directory


def model(directory, family):
    """The same in torch."""
    return MODELS[family].from_pretrained(directory).eval()


def pipeline(directory, family):
    """A pipeline of diffusers with nothing but the transformer."""
    return PIPELINES[family](
        transformer=model(directory, family),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(PARTS[family]),
    )


def ours(directory, path):
    """Torch name -> weight, with our reading of a LoRA merged."""
    variables = load_transformer(directory)[1]
    with jax.default_matmul_precision("highest"):
        found = lora.attach(variables, read_lora(path, variables["params"]))
        merged = {**found, "params": lora.merge(found["params"], found["lora"])}
    return to_torch(merged)


def of_peft(directory, family, path):
    """The same by PEFT, of a directory that PEFT has written."""
    with torch.no_grad():
        wrapped = peft.PeftModel.from_pretrained(model(directory, family), path)
        return numbers(wrapped.merge_and_unload())


def of_diffusers(directory, family, path):
    """The same by the pipeline of diffusers."""
    pipe = pipeline(directory, family)
    with torch.no_grad():
        pipe.load_lora_weights(path)
        pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    return numbers(pipe.transformer)


def numbers(module):
    """The state dict of a module in numpy."""
    return {name: value.detach().float().numpy() for name, value in module.state_dict().items()}


def assert_merged(found, expected, base):
    """The same weights, and other ones than the base model's."""
    changed = [n for n in expected if n in base and np.abs(expected[n] - base[n]).max() > 1e-3]
    assert changed
    for name, value in found.items():
        if name in expected:
            np.testing.assert_allclose(value, expected[name], atol=2e-5, rtol=1e-5, err_msg=name)
    assert set(changed) <= set(found)


def factors(modules, rank=2, seed=0, scale=0.3):
    """Module -> (A [r, in], B [out, r]) for a table module -> (in, out)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            scale * torch.randn(rank, fan_in, generator=generator),
            scale * torch.randn(fan_out, rank, generator=generator),
        )
        for module, (fan_in, fan_out) in modules.items()
    }


def save_peft(directory, tensors, settings):
    """A directory as PEFT writes it, by hand: module.part -> tensor, and adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors")
    text = json.dumps({"peft_type": "LORA", **settings})
    (directory / "adapter_config.json").write_text(text)
    return directory
