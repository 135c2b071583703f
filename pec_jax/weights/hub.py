"""From the name of a model to its directory on this machine: a path, or a hub id at a revision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from etils import epath

from pec_jax import io
from pec_jax.io import read_json
from pec_jax.weights import torch_files
from pec_jax.weights.parts import GGUF, only_variants, variants
from pec_jax.weights.tensors import STEMS, WeightsError

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# What a model directory consists of. Pickles (.bin, .ckpt) and code (.py) are never fetched.
FILES = ("*.json", "*.txt", "*.model")
NESTED_FILES = (*FILES, *(f"*/{pattern}" for pattern in FILES))
WEIGHTS = "*.safetensors"
FILES_OF_WEIGHTS = (".safetensors", GGUF, ".ckpt", *torch_files.SUFFIXES)


def model_directory(name: str, variant: str = "", without: Sequence[str] = ()) -> Path:
    """The directory of a model, fetched from the Hugging Face hub where it is not on the disk.

    Args:
        name: a directory, local or gs://BUCKET/PATH, or `organisation/model@revision`: a commit
            pins what is fetched.
        variant: such as "fp16", of the parts of a pipeline that have it; other variants are not
            fetched.
        without: parts of a pipeline whose weights are not fetched.

    Returns:
        The directory; of a remote one, a copy in the cache; of a hub id, its snapshot in the
        hub's cache.

    Raises:
        WeightsError: neither a directory nor a hub id; no revision; or the hub has no such model,
            no such revision, wants a licence accepted, or cannot be reached.
    """
    path = io.path(name)
    if path.exists():
        return local_directory(path, variant, without)
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise WeightsError(
            f"{name}: no such directory, and no hub id of the form organisation/model@revision"
        )
    if match["revision"] is None:
        raise WeightsError(
            f"{name}: no such directory. To fetch a model from the hub, pin its revision: "
            f"{name}@COMMIT, with a commit from https://huggingface.co/{name}/commits/main"
        )
    return _fetch(match["repo"], match["revision"], variant, without)


def model_path(name: str) -> Path:
    """As `model_directory`, and a file of weights by its own path."""
    path = io.path(name)
    if path.is_file() and not io.is_remote(path):
        return Path(path)
    if path.suffix in FILES_OF_WEIGHTS and not path.exists():
        raise WeightsError(f"{name}: no such file")
    return model_directory(name)


def local_directory(path: epath.Path, variant: str = "", without: Sequence[str] = ()) -> Path:
    """A model directory on this machine: itself, or a copy of what a bucket holds of the model."""
    if not io.is_remote(path):
        return Path(path)
    root = io.local_copy(path, NESTED_FILES)
    parts = _parts(root)
    held = {part: _variants_in(path / part) for part in parts}
    return io.local_copy(path, _patterns(parts, variant, without, held))


def _fetch(repo: str, revision: str, variant: str, without: Sequence[str]) -> Path:
    # Slow to import, and not needed for what is on the disk already.
    import huggingface_hub
    from huggingface_hub import errors

    def download(patterns: Sequence[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns)
            )
        )

    where = f"{repo}@{revision}"
    try:
        root = download(NESTED_FILES)
        parts = _parts(root)
        wanted = [part for part in parts if part not in without]
        if variant and wanted:  # which parts have it is seen only once it is there
            download([pattern for part in wanted for pattern in _weights(part, variant)])
        held = {part: _variants_in(root / part) for part in parts}
        root = download(_patterns(parts, variant, without, held))
    except errors.GatedRepoError:
        raise WeightsError(
            f"{where}: accept the licence at https://huggingface.co/{repo}, then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise WeightsError(
            f"{where}: no such revision; see https://huggingface.co/{repo}/commits/main"
        ) from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(
            f"{where}: the hub has no such model, or it is private (`hf auth login`)"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(
            f"{where}: the hub cannot be reached ({type(error).__name__}), and the model is not "
            "in its cache; connect, or give a directory"
        ) from error
    _check_variants(root, wanted, repo, revision)
    return root


def _parts(root: Path) -> list[str]:
    """The parts that model_index.json names; none of a single network."""
    index = root / "model_index.json"
    if not index.is_file():
        return []
    return [
        name
        for name, entry in read_json(index).items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    ]


def _variants_in(directory: epath.Path | Path) -> list[str]:
    files = [file.name for file in directory.iterdir()] if directory.is_dir() else []
    return [variant for stem in STEMS for variant in variants(files, stem)]


def _weights(part: str, variant: str = "") -> list[str]:
    """Patterns of a part's weights, whole or in shards, of a variant or of none."""
    shard = "-?????-of-?????"
    if variant:
        return [f"{part}/*.{variant}{shard}.safetensors", f"{part}/*.{variant}.safetensors"]
    return [f"{part}/{stem}{end}.safetensors" for stem in STEMS for end in ("", shard)]


def _patterns(
    parts: Sequence[str], variant: str, without: Sequence[str], held: Mapping[str, Sequence[str]]
) -> list[str]:
    """Everything of a model: the parts of a pipeline, or a single network.

    A repository often holds the same weights once more for other programs, in its root.
    """
    if not parts:
        return [*FILES, WEIGHTS]
    patterns = [*FILES]
    for part in parts:
        patterns += [f"{part}/{pattern}" for pattern in FILES]
        if part not in without:
            patterns += _weights(part, variant if variant in held[part] else "")
    return patterns


def _check_variants(root: Path, parts: Sequence[str], repo: str, revision: str) -> None:
    """Says so where the hub has variants alone of a part: then nothing of it has been fetched."""
    import huggingface_hub
    from huggingface_hub import errors

    lacking = [
        part
        for part in parts
        if (root / part / "config.json").is_file() and not list((root / part).glob(WEIGHTS))
    ]
    if not lacking:
        return
    try:
        files = huggingface_hub.list_repo_files(repo, revision=revision)
    except (errors.HfHubHTTPError, OSError):
        return  # what is missing is named when it is opened
    for part in lacking:
        inside = [file.removeprefix(f"{part}/") for file in files if file.startswith(f"{part}/")]
        for stem in STEMS:
            if inside and (found := variants(inside, stem)):
                raise WeightsError(f"{repo}@{revision}: {only_variants(part, found)}")
