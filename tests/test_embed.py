"""Embedding prompts beforehand: the same numbers, resumable, and tied to its text encoders."""

from __future__ import annotations

import numpy as np
import pytest

from pec_jax.config.schema import from_config_dict
from pec_jax.data import encode_prompts as embedding
from pec_jax.data.embedding_store import PART, EmbeddingStore
from pec_jax.errors import FileError
from pec_jax.families.locate import SHAPES_DIRECTORY, prompt_file
from pec_jax.families.pipeline import load_pipeline
from pec_jax.training.build import build
from pec_jax.weights.tensors import WeightsError

SETS = ("shapes/train_open", "shapes/heldout_open")


def run(out, sets=SETS, **options):
    settings = {"dtype": "float32", "t5_length": 0, "variant": ""} | options
    embedding.run("shapes", sets, out, **settings)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    out = tmp_path_factory.mktemp("embeddings") / "shapes"
    run(out)
    return out


def test_rows_are_what_the_encoders_give(stored):
    store = EmbeddingStore(stored)
    prompts = ["", *prompt_file(SETS[0]).read_text().splitlines()[:3]]
    found = store.gather(store.rows(prompts))
    expected = load_pipeline(SHAPES_DIRECTORY).text.encode(prompts)
    # Batches of another size round differently.
    np.testing.assert_allclose(found.tokens, expected.tokens, atol=1e-5)
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-5)


def test_a_run_reads_them_instead_of_encoding(stored, small_config):
    encoded = build(from_config_dict(small_config))
    small_config.prompts.embeddings = str(stored)
    read = build(from_config_dict(small_config))
    ids = np.array([3, 0])
    a, b = (e.tables["train"].gather(ids) for e in (encoded, read))
    np.testing.assert_allclose(a.conditioning.tokens, b.conditioning.tokens, atol=1e-5)
    np.testing.assert_allclose(
        encoded.frozen.negative.pooled, read.frozen.negative.pooled, atol=1e-5
    )


def test_an_interrupted_command_goes_on(stored, tmp_path):
    out = tmp_path / "again"
    run(out)
    parts = sorted(out.glob("*.safetensors"))
    assert len(parts) == -(-len(EmbeddingStore(out)) // PART) > 1
    before = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    with pytest.raises(WeightsError, match=r"run pec_jax\.embed again"):
        EmbeddingStore(out)
    run(out)
    assert parts[0].stat().st_mtime_ns == before
    assert parts[1].read_bytes() == (stored / parts[1].name).read_bytes()


def test_bf16_halves_the_files(stored, tmp_path):
    run(tmp_path / "half", dtype="bfloat16")
    sizes = [
        sum(p.stat().st_size for p in d.glob("*.safetensors")) for d in (stored, tmp_path / "half")
    ]
    assert sizes[1] < 0.51 * sizes[0]
    assert EmbeddingStore(tmp_path / "half").gather(np.array([0])).tokens.dtype == np.float32


class TestClearErrors:
    def test_a_prompt_that_was_not_embedded(self, stored, small_config):
        small_config.prompts.embeddings = str(stored)
        small_config.prompts.samples = ("a house",)
        with pytest.raises(WeightsError, match=r"1 prompts are not embedded.*'a house'"):
            build(from_config_dict(small_config))

    def test_other_text_encoders(self, stored, small_config):
        small_config.prompts.embeddings = str(stored)
        small_config.model.t5_length = 9
        with pytest.raises(WeightsError, match="other text encoders"):
            build(from_config_dict(small_config))

    def test_a_directory_of_other_prompts(self, stored):
        with pytest.raises(WeightsError, match="choose another --out"):
            run(stored, sets=SETS[:1])

    def test_a_directory_of_other_files_is_left_alone(self, tmp_path, monkeypatch):
        (tmp_path / "thesis.txt").write_text("mine")
        monkeypatch.setattr(embedding, "encoders_mark", None)  # refused before it reads a model
        with pytest.raises(WeightsError, match=r"such as thesis\.txt"):
            run(tmp_path)

    def test_a_damaged_part(self, stored, tmp_path):
        out = tmp_path / "damaged"
        run(out)
        part = sorted(out.glob("*.safetensors"))[0]
        part.write_bytes(part.read_bytes()[:-100])
        store = EmbeddingStore(out)
        with pytest.raises(WeightsError, match="delete it and embed again"):
            store.gather(np.array([0]))

    def test_no_store(self, tmp_path):
        with pytest.raises(FileError, match=r"index\.json: no such file"):
            EmbeddingStore(tmp_path)
