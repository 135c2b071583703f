"""Safetensors files: whole, sharded, damaged, and files that must not be opened."""

from __future__ import annotations

import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from pec_jax.weights.tensors import WeightsError, read_metadata, read_tensors, write_tensors

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.bias": np.ones(4, np.float16),
}


def write_shards(directory, weight_map=None):
    save_file({"a.weight": TENSORS["a.weight"]}, directory / "model-00001-of-00002.safetensors")
    save_file({"b.bias": TENSORS["b.bias"]}, directory / "model-00002-of-00002.safetensors")
    weight_map = weight_map or {
        "a.weight": "model-00001-of-00002.safetensors",
        "b.bias": "model-00002-of-00002.safetensors",
    }
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same(found):
    assert set(found) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert found[name].dtype == expected.dtype
        assert found.shape(name) == expected.shape
        np.testing.assert_array_equal(found[name], expected)


class TestReading:
    def test_one_file_round_trip(self, tmp_path):
        path = write_tensors(tmp_path / "new", TENSORS)
        assert path == tmp_path / "new" / "model.safetensors"
        found = read_tensors(tmp_path / "new")
        assert_same(found)
        assert found.file("a.weight") == path

    def test_shards(self, tmp_path):
        write_shards(tmp_path)
        found = read_tensors(tmp_path, "model")
        assert_same(found)
        assert found.file("b.bias").name == "model-00002-of-00002.safetensors"

    def test_bfloat16(self, tmp_path):
        value = np.asarray(jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16))
        write_tensors(tmp_path, {"x": value})
        found = read_tensors(tmp_path)["x"]
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, value)

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)],
    )
    def test_float8(self, tmp_path, kind, dtype):
        """The library neither reads nor writes them with numpy; the file is made by hand."""
        value = np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3).astype(dtype)
        header = {
            "a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
            "x": {"dtype": kind, "shape": [2, 3], "data_offsets": [5, 11]},
        }
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + b"\1" * 5 + value.tobytes()
        (tmp_path / "model.safetensors").write_bytes(content)
        found = read_tensors(tmp_path)["x"]
        assert found.dtype == dtype and found.shape == (2, 3)
        np.testing.assert_array_equal(found.astype(np.float32), value.astype(np.float32))

    def test_a_type_that_numpy_has_not(self, tmp_path):
        header = {"x": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}
        text = json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1\1")
        with pytest.raises(WeightsError, match="'x' cannot be read, its type is F8_E8M0; save it"):
            read_tensors(tmp_path)["x"]

    def test_stem_of_diffusers_is_found(self, tmp_path):
        write_tensors(tmp_path, TENSORS, "diffusion_pytorch_model")
        assert_same(read_tensors(tmp_path))
        with pytest.raises(WeightsError, match=r"holds no model\.safetensors"):
            read_tensors(tmp_path, "model")

    def test_arrays_that_are_not_contiguous_are_stored_as_seen(self, tmp_path):
        value = np.arange(6, dtype=np.float32).reshape(2, 3).T
        write_tensors(tmp_path, {"x": value})
        np.testing.assert_array_equal(read_tensors(tmp_path)["x"], value)

    def test_a_scalar_stays_one(self, tmp_path):
        write_tensors(tmp_path, {"logit_scale": np.asarray(2.5, np.float32)})
        assert read_tensors(tmp_path)["logit_scale"].shape == ()


class TestClearErrors:
    def test_no_directory(self, tmp_path):
        with pytest.raises(WeightsError, match="nowhere: no such directory"):
            read_tensors(tmp_path / "nowhere")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(WeightsError, match=r"model\.safetensors or diffusion_pytorch_model"):
            read_tensors(tmp_path)

    def test_a_pickle_is_refused_by_name(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin: a pickle.*safe_serialization"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize("keep", [0, 4, 40, -1])
    def test_truncated_file(self, tmp_path, keep):
        path = write_tensors(tmp_path, TENSORS)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(WeightsError, match=r"model\.safetensors: truncated"):
            read_tensors(tmp_path)

    def test_header_of_absurd_size(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            read_tensors(tmp_path)

    def test_missing_shard(self, tmp_path):
        write_shards(tmp_path)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(WeightsError, match=r"model-00002.*: missing shard"):
            read_tensors(tmp_path)

    def test_shard_without_its_tensor(self, tmp_path):
        first = "model-00001-of-00002.safetensors"
        write_shards(tmp_path, {"a.weight": first, "b.bias": first})
        with pytest.raises(WeightsError, match=rf"{first}.*'b\.bias'"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", "", 7, None])
    def test_index_that_points_elsewhere(self, tmp_path, shard):
        write_shards(tmp_path, {"a.weight": shard})
        with pytest.raises(WeightsError, match="not a file name"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
    def test_index_without_a_map(self, tmp_path, text):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(WeightsError, match="no weight_map"):
            read_tensors(tmp_path)


class TestMetadata:
    def test_the_notes_are_those_of_the_library(self, tmp_path):
        path = write_tensors(tmp_path, TENSORS, metadata={"a": "é"})
        with safe_open(path, framework="numpy") as file:
            assert read_metadata(path) == file.metadata() == {"format": "pt", "a": "é"}

    @pytest.mark.parametrize(
        "content", [b"", b"\2", b"\xff" * 8, b"\2\0\0\0\0\0\0\0[]", b"\1\0\0\0\0\0\0\0{"]
    )
    def test_what_is_no_safetensors_file_is_named(self, tmp_path, content):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=r"x\.safetensors: truncated or not"):
            read_metadata(tmp_path / "x.safetensors")


class TestWritingIsAtomic:
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        write_tensors(tmp_path, TENSORS)

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write_tensors(tmp_path, {"other": np.zeros(3)})
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        assert_same(read_tensors(tmp_path))

    def test_the_file_is_as_readable_as_any_other(self, tmp_path):
        path = write_tensors(tmp_path, TENSORS)
        (tmp_path / "other").touch()
        assert os.stat(path).st_mode == os.stat(tmp_path / "other").st_mode
