"""Opening the weights of one part of a pipeline; where that fails, the cause and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pec_jax.weights import model_files
from pec_jax.weights.tensors import TensorFiles, Tensors, WeightsError, read_tensors

GGUF = ".gguf"
_SHARD = r"-\d{5}-of-\d{5}"
_POINTER = (
    b"version https://git-lfs.github.com/spec"  # what a file begins with that git did not fetch
)


def variants(files: Iterable[str], stem: str) -> list[str]:
    """The variants, such as fp16, that files of weights have by their names.

    Args:
        files: names.
        stem: "model" (transformers) or "diffusion_pytorch_model" (diffusers).
    """
    pattern = re.compile(
        rf"{stem}\.safetensors\.index\.(?P<index>[\w-]+)\.json"
        rf"|{stem}({_SHARD})?\.(?P<whole>\w+)({_SHARD})?\.safetensors"
    )
    found = (pattern.fullmatch(file) for file in files)
    return sorted({m["index"] or m["whole"] for m in found if m})


def only_variants(part: str, found: Sequence[str]) -> str:
    """What to say of a part of which there are variants alone."""
    kinds = f"variant{'s' * (len(found) > 1)} {' and '.join(found)}"
    return (
        f"{part}: holds only the {kinds} of its weights: set config.model.variant={found[0]}, "
        f"or --variant={found[0]}"
    )


def open_part(directory: Path, stem: str, variant: str = "", origin: str = "") -> TensorFiles:
    """`read_tensors`, and a remedy for each of the usual reasons why there is nothing to read.

    Args:
        directory: the part's, such as PIPELINE/transformer.
        stem: as in `variants`.
        variant: that is asked for.
        origin: a hub id that has such a part as safetensors, for messages.

    Raises:
        WeightsError: no weights, in another format, another variant or under another name; or
            files that are damaged.
    """
    files = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    suffixes = ("", f".{variant}") if variant else ("",)
    expected = {f"{stem}{s}.safetensors" for s in suffixes}
    expected |= {f"{stem}.safetensors.index{s}.json" for s in suffixes}
    if not expected & set(files):
        if found := variants(files, stem):
            raise WeightsError(only_variants(str(directory), found))
        _check_formats(directory, files, stem, origin)
    for name in files:
        if name.startswith(stem) and name.endswith(".safetensors"):
            _check_fetched(directory / name)
    return read_tensors(directory, stem, variant)


def open_file(path: Path, origin: str = "") -> Tensors:
    """`model_files.open_model` of a file, with the same remedies as `open_part`."""
    if path.suffix == GGUF:
        raise WeightsError(_no_gguf(path, origin))
    _check_fetched(path)
    return model_files.open_model(path)


def _check_formats(directory: Path, files: list[str], stem: str, origin: str) -> None:
    for name in files:
        if name.endswith(GGUF):
            raise WeightsError(_no_gguf(directory / name, origin))
    others = [name for name in files if name.endswith(".safetensors")]
    if others:
        whole = "a transformer in its publisher's single file is given as config.model.transformer"
        raise WeightsError(
            f"{directory}: holds {', '.join(others[:3])}, where {stem}.safetensors is expected; "
            + (whole if origin else "fetch the model again")
        )


def _no_gguf(file: Path, origin: str) -> str:
    use = f", such as those of {origin}" if origin else ""
    return f"{file}: GGUF is not supported: use the safetensors that it was made from{use}"


def _check_fetched(file: Path) -> None:
    with file.open("rb") as handle:
        if handle.read(len(_POINTER)) == _POINTER:
            raise WeightsError(
                f"{file}: is a Git LFS pointer and not the file itself: run `git lfs pull` in "
                f"{file.parent}"
            )
