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
