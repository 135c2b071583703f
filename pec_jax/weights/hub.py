"""From the name of a model to its directory on this machine: a path, or a hub id at a revision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from pec_jax import io
from pec_jax.io import read_json
from pec_jax.weights.tensors import WeightsError

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# What a model directory consists of. Pickles (.bin, .ckpt) and code (.py) are never fetched.
FILES = ("*.json", "*.txt", "*.model")
NESTED_FILES = (*FILES, *(f"*/{pattern}" for pattern in FILES))
WEIGHTS = "*.safetensors"


def model_directory(name: str, variant: str = "") -> Path:
    """The directory of a model, fetched from the Hugging Face hub where it is not on the disk.

    Args:
        name: a directory, local or gs://BUCKET/PATH, or `organisation/model@revision`: a commit
            pins what is fetched.
        variant: such as "fp16"; other variants are not fetched.

    Returns:
        The directory; of a remote one, a copy in the cache; of a hub id, its snapshot in the
        hub's cache.

    Raises:
        WeightsError: neither a directory nor a hub id; no revision; or the hub has no such model,
            no such revision, wants a licence accepted, or cannot be reached.
    """
    path = io.path(name)
    if path.exists():
        return local_directory(path, variant)
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
    return _fetch(match["repo"], match["revision"], variant)


def model_path(name: str) -> Path:
    """As `model_directory`, and a file of weights by its own path."""
    path = io.path(name)
    if path.is_file() and not io.is_remote(path):
        return Path(path)
    return model_directory(name)


def local_directory(path: epath.Path, variant: str = "") -> Path:
    """A model directory on this machine: itself, or a copy of what a bucket holds of the model."""
    if not io.is_remote(path):
        return Path(path)
    root = io.local_copy(path, NESTED_FILES)
    return io.local_copy(path, _weight_patterns(root, variant))


def _fetch(repo: str, revision: str, variant: str) -> Path:
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
        return download(_weight_patterns(root, variant))
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


def _weight_patterns(root: Path, variant: str) -> list[str]:
    """Everything of a model: the parts that model_index.json names, or a single network."""
    index = root / "model_index.json"
    if not index.is_file():
        return [*FILES, WEIGHTS]
    parts = [
        name
        for name, entry in read_json(index).items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    ]
    # A repository often holds the same weights once more for other programs, in its root.
    weights = (f"*.{variant}*.safetensors",) if variant else (WEIGHTS,)
    return [*FILES, *(f"{part}/{pattern}" for part in parts for pattern in (*FILES, *weights))]
