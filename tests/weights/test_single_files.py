"""Transformers by their publishers' names, against diffusers' own conversion."""

from __future__ import annotations

import types

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from pec_jax.families.flux import Flux1
from pec_jax.families.sd3 import StableDiffusion3
from pec_jax.weights import single_files
from pec_jax.weights.tensors import WeightsError, read_file

ALL_IN_ONE = "model.diffusion_model."
OTHERS = {  # what ComfyUI's files hold beside the transformer
    "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
    "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": (8,),
    "text_encoders.t5xxl.transformer.shared.weight": (5, 8),
}
SD3_KINDS = {
    "3.0": {"dual_attention_layers": [], "qk_norm": None},
    "3.5 large": {"dual_attention_layers": []},
    "3.5 medium": {"dual_attention_layers": [0, 1]},
}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def sd3_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of mmditx.py of Stability AI."""
    d, patch = c["caption_projection_dim"], c["patch_size"]
    shapes = {
        "pos_embed": (1, c["pos_embed_max_size"] ** 2, d),
        "x_embedder.proj.weight": (d, c["in_channels"], patch, patch),
        "x_embedder.proj.bias": (d,),
        **linear("t_embedder.mlp.0", d, 256),
        **linear("t_embedder.mlp.2", d, d),
        **linear("y_embedder.mlp.0", d, c["pooled_projection_dim"]),
        **linear("y_embedder.mlp.2", d, d),
        **linear("context_embedder", d, c["joint_attention_dim"]),
        **linear("final_layer.linear", patch**2 * c["out_channels"], d),
        **linear("final_layer.adaLN_modulation.1", 2 * d, d),
    }
    for i in range(c["num_layers"]):
        for stream in ("x_block", "context_block"):
            name, ends = f"joint_blocks.{i}.{stream}", i == c["num_layers"] - 1
            ends, dual = ends and stream == "context_block", i in c["dual_attention_layers"]
            dual = dual and stream == "x_block"
            shapes |= linear(f"{name}.adaLN_modulation.1", (2 if ends else 9 if dual else 6) * d, d)
            for attention in ("attn", "attn2") if dual else ("attn",):
                shapes |= linear(f"{name}.{attention}.qkv", 3 * d, d)
                if c["qk_norm"]:
                    for norm in ("ln_q", "ln_k"):
                        shapes[f"{name}.{attention}.{norm}.weight"] = (c["attention_head_dim"],)
                if not ends:
                    shapes |= linear(f"{name}.{attention}.proj", d, d)
            if not ends:
                shapes |= linear(f"{name}.mlp.fc1", 4 * d, d) | linear(f"{name}.mlp.fc2", d, 4 * d)
    return shapes


def flux_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of model.py of Black Forest Labs."""
    head = c["attention_head_dim"]
    d = head * c["num_attention_heads"]
    inputs = {"time_in": 256, "vector_in": c["pooled_projection_dim"]}
    inputs |= {"guidance_in": 256} if c["guidance_embeds"] else {}
    shapes = {
        **linear("img_in", d, c["in_channels"]),
        **linear("txt_in", d, c["joint_attention_dim"]),
        **linear("final_layer.linear", c["in_channels"], d),
        **linear("final_layer.adaLN_modulation.1", 2 * d, d),
    }
    for name, width in inputs.items():
        shapes |= linear(f"{name}.in_layer", d, width) | linear(f"{name}.out_layer", d, d)
    for i in range(c["num_layers"]):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes |= linear(f"{stream}_mod.lin", 6 * d, d) | linear(f"{stream}_attn.proj", d, d)
            shapes |= linear(f"{stream}_attn.qkv", 3 * d, d)
            shapes |= linear(f"{stream}_mlp.0", 4 * d, d) | linear(f"{stream}_mlp.2", d, 4 * d)
            for norm in ("query_norm", "key_norm"):
                shapes[f"{stream}_attn.norm.{norm}.scale"] = (head,)
    for i in range(c["num_single_layers"]):
        name = f"single_blocks.{i}"
        shapes |= linear(f"{name}.linear1", 7 * d, d) | linear(f"{name}.linear2", d, 5 * d)
        shapes |= linear(f"{name}.modulation.lin", 3 * d, d)
        for norm in ("query_norm", "key_norm"):
            shapes[f"{name}.norm.{norm}.scale"] = (head,)
    return shapes


def checkpoint(shapes: dict, dtype: torch.dtype, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random tensors, with those of other parts where there is a prefix."""
    torch.manual_seed(0)
    named = {f"{prefix}{name}": shape for name, shape in shapes.items()}
    named |= OTHERS if prefix else {}
    return {name: torch.randn(shape).to(dtype) for name, shape in named.items()}


def flux_conversion(width: int):
    """diffusers' function, in which the width of the published model is a constant."""
    theirs = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    constants = theirs.__code__.co_consts
    assert constants.count(3072) == 1
    code = theirs.__code__.replace(co_consts=tuple(width if c == 3072 else c for c in constants))
    cells = theirs.__closure__
    return types.FunctionType(code, theirs.__globals__, closure=cells)


def converted(path, original: single_files.Original) -> dict[str, np.ndarray]:
    return dict(original.to_diffusers(single_files.transformer_tensors(read_file(path))))


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    """To the bit, in names, shapes and types."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        bits = tensor.contiguous().view(torch.uint8).numpy()
        assert ours[name].shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(np.ascontiguousarray(ours[name]).view(np.uint8), bits, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", ["", ALL_IN_ONE])
@pytest.mark.parametrize("kind", SD3_KINDS)
def test_sd3_is_what_diffusers_makes_of_it(tmp_path, kind, prefix, dtype):
    config = {**StableDiffusion3.tiny, **SD3_KINDS[kind]}
    state = checkpoint(sd3_shapes(config), dtype, prefix)
    save_file(state, tmp_path / "sd3.safetensors")
    ours = converted(tmp_path / "sd3.safetensors", single_files.SD3)
    theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
    diffusers.SD3Transformer2DModel(**config).load_state_dict(theirs)  # names and shapes are real
    assert_equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["", ALL_IN_ONE])
@pytest.mark.parametrize("guidance", [False, True], ids=["schnell", "dev"])
def test_flux_is_what_diffusers_makes_of_it(tmp_path, guidance, prefix):
    config = {**Flux1.tiny, "guidance_embeds": guidance}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    state = checkpoint(flux_shapes(config), torch.bfloat16, prefix)
    save_file(state, tmp_path / "flux.safetensors")
    ours = converted(tmp_path / "flux.safetensors", single_files.FLUX)
    theirs = flux_conversion(width)(state)
    diffusers.FluxTransformer2DModel(**config).load_state_dict(theirs)
    assert_equal(ours, theirs)


def test_names_of_diffusers_are_kept_without_what_wraps_them(tmp_path):
    names = {"proj_out.weight": torch.ones(2, 2), "proj_out.bias": torch.ones(2)}
    save_file({f"_orig_mod.{k}": v for k, v in names.items()}, tmp_path / "a.safetensors")
    assert set(converted(tmp_path / "a.safetensors", single_files.SD3)) == set(names)


@pytest.mark.parametrize(
    "name", ["scaled_fp8", "double_blocks.0.img_mlp.0.scale_weight", "txt_in.weight.absmax"]
)
def test_scales_of_quantised_weights_are_named(tmp_path, name):
    save_file({f"{ALL_IN_ONE}{name}": torch.ones(1)}, tmp_path / "q.safetensors")
    with pytest.raises(WeightsError, match=rf"q\.safetensors: holds quantised .*{name}.*bf16"):
        single_files.transformer_tensors(read_file(tmp_path / "q.safetensors"))


def test_what_does_not_divide_is_named(tmp_path):
    state = {"joint_blocks.0.x_block.attn.qkv.bias": torch.ones(10)}
    save_file(state, tmp_path / "a.safetensors")
    ours = single_files.SD3.to_diffusers(read_file(tmp_path / "a.safetensors"))
    with pytest.raises(WeightsError, match=r"shape \[10\], which does not divide into 3 parts"):
        ours.shape("transformer_blocks.0.attn.to_k.bias")
