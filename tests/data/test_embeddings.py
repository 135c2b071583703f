import jax
import numpy as np
import pytest

from pec_jax.data.embeddings import EmbeddingsInMemory, PromptTable
from pec_jax.types import Conditioning


@pytest.fixture
def table():
    conditioning = Conditioning(
        tokens=np.arange(5 * 3 * 2, dtype=np.float32).reshape(5, 3, 2),
        pooled=np.arange(5 * 4, dtype=np.float32).reshape(5, 4),
    )
    inputs = {"attributes": np.arange(10).reshape(5, 2), "warmth": {}}
    return PromptTable(EmbeddingsInMemory(conditioning), np.array([4, 1, 2, 3, 0]), inputs)


def test_gathers_rows_of_everything(table):
    batch = table.gather([3, 0, 3])
    np.testing.assert_array_equal(batch.prompt_ids, [3, 0, 3])
    assert batch.prompt_ids.dtype == np.int32
    everything = table.embeddings.conditioning
    np.testing.assert_array_equal(batch.conditioning.tokens, everything.tokens[[3, 4, 3]])
    np.testing.assert_array_equal(batch.conditioning.pooled[1], [16, 17, 18, 19])
    np.testing.assert_array_equal(batch.reward_inputs["attributes"], [[6, 7], [0, 1], [6, 7]])
    assert batch.reward_inputs["warmth"] == {}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


def test_size(table):
    assert len(table) == 5


@pytest.mark.parametrize("ids", [[5], [-1], [0, 99]])
def test_ids_outside_the_table(table, ids):
    with pytest.raises(IndexError, match="table of 5 prompts"):
        table.gather(ids)


def test_rows_must_match(table):
    with pytest.raises(ValueError, match=r"5 prompts needs one row.*pickscore.*\(4, 2\)"):
        PromptTable(table.embeddings, table.rows, {"pickscore": np.zeros((4, 2))})
