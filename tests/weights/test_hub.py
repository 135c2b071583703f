"""Names of models: directories, hub ids, and what is said where there is neither."""

from __future__ import annotations

import fnmatch
import json

import huggingface_hub
import pytest
from huggingface_hub import errors

from pec_jax.weights import hub
from pec_jax.weights.tensors import WeightsError
from tests import fake_bucket

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_directory_is_itself(tmp_path):
    assert hub.model_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "/no/such/place", "a/b/c", "a b/c"])
def test_neither_directory_nor_hub_id(name):
    with pytest.raises(WeightsError, match="no such directory, and no hub id"):
        hub.model_directory(name)


def test_a_file_that_is_not_there_is_no_hub_id():
    with pytest.raises(WeightsError, match=r"^models/flux1-dev\.safetensors: no such file$"):
        hub.model_path("models/flux1-dev.safetensors")


def test_a_hub_id_must_be_pinned():
    with pytest.raises(WeightsError, match=r"pin its revision: org/name@COMMIT"):
        hub.model_directory("org/name")


def test_without_a_network():
    """The machine that runs the tests need not have one; where it has, there is no such model."""
    with pytest.raises(WeightsError, match=r"cannot be reached|no such model"):
        hub.model_directory(f"pec-jax-tests/no-such-model@{COMMIT}")


INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "image_encoder": [None, None],
}
CONFIGS = [f"{part}/config.json" for part in ("transformer", "vae", "text_encoder")]
SMALL = {"model_index.json", "tokenizer/vocab.json", *CONFIGS}
DENOISER, VAE, TEXT = (
    "transformer/diffusion_pytorch_model",
    "vae/diffusion_pytorch_model",
    "text_encoder/model",
)
ELSEWHERE = {"sd3.5.safetensors", "image_encoder/model.safetensors", "vae/model.bin", "vae/a.py"}
PLAIN = {
    f"{DENOISER}-00001-of-00002.safetensors",
    f"{DENOISER}-00002-of-00002.safetensors",
    f"{VAE}.safetensors",
    f"{TEXT}.safetensors",
}


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A repository, as a set of files, of which what is asked for appears in a directory."""
    files, root = {*SMALL, *ELSEWHERE}, tmp_path / "snapshot"

    def download(repo, revision, allow_patterns):
        assert (repo, revision) == ("org/name", COMMIT)
        for name in files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(json.dumps(INDEX if "index" in name else {}))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: sorted(files))
    return files


def fetched(**options) -> set[str]:
    """The files of the snapshot after it was fetched."""
    root = hub.model_directory(f"org/name@{COMMIT}", **options)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_only_the_parts_are_fetched(fake_hub):
    fake_hub |= PLAIN
    assert fetched() == SMALL | PLAIN


def test_a_lone_network(fake_hub):
    fake_hub.clear()
    fake_hub |= {"config.json", "model.safetensors", "model.bin"}
    assert fetched() == {"config.json", "model.safetensors"}


def test_other_variants_stay_away(fake_hub):
    fake_hub |= PLAIN | {f"{TEXT}.fp16.safetensors", f"{DENOISER}.bf16-00001-of-00002.safetensors"}
    assert fetched() == SMALL | PLAIN


@pytest.mark.parametrize(
    "denoiser",
    [
        {f"{DENOISER}.fp16.safetensors"},
        {f"{DENOISER}.fp16-00001-of-00002.safetensors"},
        {f"{DENOISER}-00001-of-00002.fp16.safetensors"},
        set(),
    ],
)
def test_what_a_part_lacks_in_the_variant_comes_without(fake_hub, denoiser):
    half = {f"{TEXT}.fp16.safetensors", *denoiser}
    fake_hub |= PLAIN | half
    expected = SMALL | half | {f"{VAE}.safetensors"}
    if not denoiser:
        expected |= {name for name in PLAIN if name.startswith(DENOISER)}
    assert fetched(variant="fp16") == expected


def test_without_the_weights_of_a_part(fake_hub):
    fake_hub |= PLAIN | {f"{DENOISER}.fp16.safetensors", f"{VAE}.fp16.safetensors"}
    rest = {f"{VAE}.safetensors", f"{TEXT}.safetensors"}
    assert fetched(without=("transformer",)) == SMALL | rest
    half = {f"{VAE}.fp16.safetensors", f"{TEXT}.safetensors"}
    assert fetched(without=("transformer",), variant="fp16") == SMALL | rest | half


def test_a_variant_alone_is_named(fake_hub):
    fake_hub |= {f"{VAE}.safetensors", f"{TEXT}.safetensors", f"{DENOISER}.fp16.safetensors"}
    message = f"org/name@{COMMIT}: transformer: holds only the variant fp16 .*variant=fp16"
    with pytest.raises(WeightsError, match=message):
        fetched()


def test_of_a_bucket_likewise(tmp_path, monkeypatch):
    monkeypatch.setenv(fake_bucket.ROOT, str(tmp_path / "buckets"))
    monkeypatch.setenv("PEC_JAX_CACHE", str(tmp_path / "cache"))
    fake_bucket.install(monkeypatch)
    model = tmp_path / "buckets" / "bucket" / "model"
    for name in SMALL | ELSEWHERE | PLAIN | {f"{TEXT}.fp16.safetensors"}:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(json.dumps(INDEX))
    for variant, text in (("", f"{TEXT}.safetensors"), ("fp16", f"{TEXT}.fp16.safetensors")):
        root = hub.model_directory("gs://bucket/model", variant)
        found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        assert found == SMALL | (PLAIN - {f"{TEXT}.safetensors"}) | {text}


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
