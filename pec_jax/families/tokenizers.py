"""Hugging Face tokenizers from local files; no code found among them is run."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pec_jax.io import read_json
from pec_jax.weights.tensors import WeightsError

CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer.json"
# Any of these makes a tokenizer. Without, transformers makes one that knows no word.
VOCABULARIES = (WHOLE, "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
SHORTEST = 2  # tokens; the first and the last alone are two
# Classes that transformers loads as they are, and the model_type of a model that may lie beside
# them. `AutoTokenizer` finds the same ones, but imports all model configs, and torch with them.
CLASSES = {"CLIPTokenizer": "clip", "T5Tokenizer": "t5"}


def load_tokenizer(directory: str | Path) -> Any:
    """Loads a tokenizer.

    Args:
        directory: holds the tokenizer's files.

    Raises:
        WeightsError: there is none, or a file that is none of a tokenizer's; the message names it.
        FileError: a file that is no JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such directory; a tokenizer is expected there")
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise WeightsError(
            f"{directory}: no usable tokenizer: holds none of {', '.join(VOCABULARIES)}; fetch it "
            "again"
        )
    config = read_config(directory)
    try:
        return _class(directory, config).from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what is wrong in a file decides what is raised
        raise _named(directory, error) from error


def stored_length(directory: Path) -> float:
    """The tokens that a tokenizer's config allows; infinity where it does not say.

    Raises:
        WeightsError: not a number of tokens.
        FileError: the config is no JSON object.
    """
    length = read_config(directory).get("model_max_length")
    return math.inf if length is None else length


def read_config(directory: Path) -> Mapping[str, Any]:
    """tokenizer_config.json, checked as far as it is read here; {} where it is absent."""
    path = directory / CONFIG
    if not path.is_file():
        return {}
    config = read_json(path)
    length = config.get("model_max_length")
    is_number = isinstance(length, int | float) and not isinstance(length, bool)
    if length is not None and not (is_number and length >= SHORTEST and length % 1 == 0):
        raise WeightsError(
            f"{path}: model_max_length = {reprlib.repr(length)} is not supported: it must be a "
            f"whole number of at least {SHORTEST}"
        )
    return config


def _class(directory: Path, config: Mapping[str, Any]) -> Any:
    """The tokenizer's class. Slow to import, and of no use to those who read embeddings."""
    import transformers

    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    beside = directory / "config.json"
    if name not in CLASSES:
        return transformers.AutoTokenizer
    if beside.is_file() and read_json(beside).get("model_type") != CLASSES[name]:
        return transformers.AutoTokenizer
    return getattr(transformers, name)


def _named(directory: Path, error: Exception) -> WeightsError:
    """The error of a tokenizer that could not be made, with the file that it is in.

    Raises:
        FileError: a file that is no JSON object.
    """
    from tokenizers import Tokenizer

    for path in sorted(directory.glob("*.json")):
        read_json(path)
    culprit = directory / CONFIG
    if (whole := directory / WHOLE).is_file():
        try:
            Tokenizer.from_file(str(whole))
        except Exception as found:  # the library has no class of its own for it
            culprit, error = whole, found
    elif not culprit.is_file():
        culprit = directory
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return WeightsError(f"{culprit}: no usable tokenizer ({reason}); restore the file")
