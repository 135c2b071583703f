"""Names of models: directories, hub ids, and what is said where there is neither."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from huggingface_hub import errors

from pec_jax.weights import hub
from pec_jax.weights.tensors import WeightsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_directory_is_itself(tmp_path):
    assert hub.model_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "/no/such/place", "a/b/c", "a b/c"])
def test_neither_directory_nor_hub_id(name):
    with pytest.raises(WeightsError, match="no such directory, and no hub id"):
        hub.model_directory(name)


def test_a_hub_id_must_be_pinned():
    with pytest.raises(WeightsError, match=r"pin its revision: org/name@COMMIT"):
        hub.model_directory("org/name")


def test_without_a_network():
    """The machine that runs the tests need not have one; where it has, there is no such model."""
    with pytest.raises(WeightsError, match=r"cannot be reached|no such model"):
        hub.model_directory(f"pec-jax-tests/no-such-model@{COMMIT}")


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """Records what is asked for and gives a directory that only has an index."""
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        index = {"vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_only_the_parts_are_fetched(fake_hub):
    hub.model_directory(f"org/name@{COMMIT}")
    repo, revision, patterns = fake_hub[-1]
    assert (repo, revision) == ("org/name", COMMIT)
    assert "vae/*.safetensors" in patterns
    assert not any(p.startswith(("*.safetensors", "image_encoder")) for p in patterns)
    hub.model_directory(f"org/name@{COMMIT}", variant="fp16")
    assert "vae/*.fp16*.safetensors" in fake_hub[-1][2]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.RepositoryNotFoundError, "no such model"),
        (errors.GatedRepoError, "accept the licence"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, message):
    def download(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(WeightsError, match=message):
        hub.model_directory(f"org/name@{COMMIT}")
