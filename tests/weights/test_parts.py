"""Directories without the weights that are expected there: the cause, and what to do."""

from __future__ import annotations

import numpy as np
import pytest

from pec_jax.weights.parts import open_file, open_part, variants
from pec_jax.weights.tensors import WeightsError, write_tensors

STEM = "diffusion_pytorch_model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4943162336\n"


@pytest.mark.parametrize(
    ("files", "variant", "message"),
    [
        ([f"{STEM}.fp16.safetensors"], "", "only the variant fp16 .*set config.model.variant=fp16"),
        ([f"{STEM}.bf16.safetensors"], "fp16", "only the variant bf16 .*variant=bf16"),
        (
            [f"{STEM}.bf16.safetensors", f"{STEM}.safetensors.index.fp16.json"],
            "",
            "only the variants bf16 and fp16",
        ),
        (["flux1-dev-Q4_0.gguf"], "", r"Q4_0\.gguf: GGUF is not supported: use .* of org/name$"),
        (["flux1-dev.safetensors"], "", "holds flux1-dev.safetensors, .*config.model.transformer"),
        ([f"{STEM}.bin"], "", r"model\.bin: a pickle, which can run code"),
        (["config.json"], "", "holds no diffusion_pytorch_model.safetensors; is the download"),
    ],
)
def test_the_cause_and_the_remedy(tmp_path, files, variant, message):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(WeightsError, match=message):
        open_part(tmp_path, STEM, variant, "org/name")


def test_a_git_lfs_pointer(tmp_path):
    for name in (f"{STEM}.safetensors", "whole.safetensors"):
        (tmp_path / name).write_text(POINTER)
    with pytest.raises(WeightsError, match=r"model\.safetensors: is a Git LFS pointer .*lfs pull"):
        open_part(tmp_path, STEM)
    with pytest.raises(WeightsError, match=r"whole\.safetensors: is a Git LFS pointer"):
        open_file(tmp_path / "whole.safetensors")


def test_what_is_there_is_opened(tmp_path):
    tensors = {"a": np.ones(2, np.float32)}
    write_tensors(tmp_path, tensors, STEM)
    assert dict(open_part(tmp_path, STEM, "fp16")).keys() == tensors.keys()
    assert dict(open_file(tmp_path / f"{STEM}.safetensors")).keys() == tensors.keys()


def test_variants_by_name():
    """As diffusers and transformers have written them: of old shards the variant comes last."""
    files = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "model.fp16.safetensors",
        "model.bf16-00001-of-00002.safetensors",
        "model-00001-of-00002.fp32.safetensors",
        "model.safetensors.index.non_ema.json",
        "other.int8.safetensors",
        "model.fp64.bin",
    ]
    assert variants(files, "model") == ["bf16", "fp16", "fp32", "non_ema"]
