"""Stored embeddings hold the fields that a conditioning has; `tests/test_embed.py` has the rest."""

from __future__ import annotations

import numpy as np
import pytest

from pec_jax.data.embedding_store import INDEX, EmbeddingStore, write_store
from pec_jax.io import write_json
from pec_jax.types import Conditioning
from pec_jax.weights.tensors import WeightsError, write_tensors

PROMPTS = ["a", "b", "c"]
TOKENS = np.arange(18, dtype=np.float32).reshape(3, 3, 2)
POOLED = np.arange(12, dtype=np.float32).reshape(3, 4)
MASK = np.array([[True, False, False], [True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    "fields", [{"pooled": POOLED}, {"mask": MASK}, {"pooled": POOLED, "mask": MASK}, {}]
)
def test_what_was_stored_comes_back(tmp_path, fields):
    conditioning = Conditioning(TOKENS, **fields)
    write_store(tmp_path, PROMPTS, "mark", lambda prompts: conditioning, dtype=np.float16)
    store = EmbeddingStore(tmp_path)
    found = store.gather(store.rows(["c", "a"]))
    np.testing.assert_array_equal(found.tokens, TOKENS[[2, 0]])
    assert found.tokens.dtype == np.float32
    for name in ("pooled", "mask"):
        if name not in fields:
            assert getattr(found, name) is None
            continue
        np.testing.assert_array_equal(getattr(found, name), fields[name][[2, 0]])
        assert getattr(found, name).dtype == fields[name].dtype


def test_stores_written_before_masks_existed_are_read(tmp_path):
    write_json(tmp_path / INDEX, {"fingerprint": "mark", "prompts": PROMPTS})
    write_tensors(tmp_path, {"tokens": TOKENS, "pooled": POOLED}, "embeddings-00000")
    found = EmbeddingStore(tmp_path).gather(np.array([1]))
    np.testing.assert_array_equal(found.tokens, TOKENS[[1]])
    np.testing.assert_array_equal(found.pooled, POOLED[[1]])
    assert found.mask is None


def test_a_file_without_tokens_is_damaged(tmp_path):
    write_json(tmp_path / INDEX, {"fingerprint": "mark", "prompts": PROMPTS})
    write_tensors(tmp_path, {"pooled": POOLED}, "embeddings-00000")
    with pytest.raises(WeightsError, match=r"00000\.safetensors: damaged"):
        EmbeddingStore(tmp_path).gather(np.array([1]))


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", "embeddings-x.safetensors"])
def test_nothing_is_written_among_other_files(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(WeightsError, match=f"holds other files, such as {name}"):
        write_store(tmp_path, PROMPTS, "mark", lambda prompts: Conditioning(TOKENS))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(WeightsError, match="is a file; --out must be a directory"):
        write_store(tmp_path / "out", PROMPTS, "mark", lambda prompts: Conditioning(TOKENS))


def test_what_an_interrupted_run_left_is_not_in_the_way(tmp_path):
    (tmp_path / ".embeddings-00000.safetensors.x1y2").write_bytes(b"half")
    (tmp_path / ".index.json.a_b").write_bytes(b"")
    write_store(tmp_path, PROMPTS, "mark", lambda prompts: Conditioning(TOKENS))
    assert len(EmbeddingStore(tmp_path)) == 3
