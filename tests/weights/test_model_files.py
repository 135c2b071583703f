"""Which file of a directory is a model's, and its conversion."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from pec_jax.weights.model_files import convert, open_model
from pec_jax.weights.tensors import WeightsError, read_metadata, read_tensors, write_tensors

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_the_file_is_found_by_its_name_then_by_being_the_only_one(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    assert open_model(tmp_path)["a"] == 0.0
    write_tensors(tmp_path, {"a": np.float32([1])}, stem="other")
    assert open_model(tmp_path)["a"] == 1.0
    write_tensors(tmp_path, {"a": np.float32([2])}, stem="open_clip_model")
    assert open_model(tmp_path)["a"] == 2.0
    write_tensors(tmp_path, {"a": np.float32([3])})
    assert open_model(tmp_path)["a"] == 3.0
    assert open_model(tmp_path / "weights.pt")["a"] == 0.0


def test_what_is_not_a_model_is_named(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: no such file"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="holds no weights"):
        open_model(tmp_path)
    for name in ("one.pt", "two.pt"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(WeightsError, match=r"holds one\.pt, two\.pt; give the path"):
        open_model(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=r"model\.gguf: not a file of tensors"):
        open_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_file_holds_the_same_and_says_of_what(tmp_path, dtype):
    tensors = {"a": torch.randn(2, 3).to(dtype), "b.weight": torch.arange(4)}
    torch.save({"state_dict": tensors}, tmp_path / "source.pt")
    path = convert(tmp_path / "source.pt", tmp_path / "out")
    read = read_tensors(tmp_path / "out")
    assert set(read) == set(tensors) and str(read["a"].dtype) == str(dtype).split(".")[1]
    np.testing.assert_array_equal(read["a"].astype(np.float32), tensors["a"].float().numpy())
    notes = read_metadata(path)
    digest = hashlib.sha256((tmp_path / "source.pt").read_bytes()).hexdigest()
    assert (notes["source"], notes["source_sha256"]) == ("source.pt", digest)


def test_the_command_converts_or_says_in_a_sentence_why_not(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")

    def command(name):
        return subprocess.run(
            [sys.executable, "-m", "pec_jax.convert", f"--file={name}", "--out=out"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = command("good.pt")
    assert done.returncode == 0 and done.stdout.strip() == "out/model.safetensors"
    failed = command("module.pt")
    assert failed.returncode == 2 and "more than tensors is not read" in failed.stderr
    assert "Traceback" not in failed.stderr
