"""Prompt files to stored embeddings, and back into a run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from pec_jax.data.embedding_store import (
    EmbeddingStore,
    fingerprint,
    refuse_other_files,
    write_store,
)
from pec_jax.data.embeddings import Embeddings, EmbeddingsInMemory
from pec_jax.data.prompts import read_prompts
from pec_jax.families.locate import pipeline_directory, prompt_files
from pec_jax.families.pipeline import load_text_stack
from pec_jax.families.registry import present_text_encoders, read_family
from pec_jax.models.text import TextStack
from pec_jax.weights.tensors import WeightsError

NEGATIVE = ""  # what classifier-free guidance steers away from


def run(
    model: str,
    prompt_sets: Sequence[str],
    out: epath.Path,
    *,
    dtype: str,
    t5_length: int,
    variant: str,
) -> None:
    """Embeds the prompts of some files or directories, and the empty one, into `out`.

    Raises:
      ValueError, OSError: sentences for a person.
    """
    refuse_other_files(out)
    root = pipeline_directory(model, variant)
    files = [file for name in prompt_sets for file in prompt_files(name)]
    prompts = [p.text for file in files for p in read_prompts(file)]
    mark = encoders_mark(root, dtype, t5_length)
    stack = load_text_stack(root, jnp.dtype(dtype), t5_length=t5_length, variant=variant)
    made = write_store(
        out,
        [*prompts, NEGATIVE],
        mark,
        stack.encode,
        dtype=jnp.dtype(dtype),
        progress=functools.partial(tqdm, desc="embedding", unit="file"),
    )
    logging.info("%d prompts embedded in %s (%d files new)", len(EmbeddingStore(out)), out, made)


def encoders_mark(root: Path, dtype: str, t5_length: int) -> str:
    """The fingerprint of a pipeline's text encoders, as they are used."""
    family = read_family(root)
    encoders = present_text_encoders(root, family)
    parts = [*(e.part for e in encoders), *(e.tokenizer for e in encoders)]
    settings: dict[str, Any] = {"dtype": dtype, "t5_length": t5_length or family.text_length}
    return fingerprint(root, parts, settings)


def stored_embeddings(directory: str, root: Path, dtype: str, t5_length: int) -> EmbeddingStore:
    """Opens embeddings for a run, and checks that they are those of its text encoders.

    Raises:
      WeightsError: no usable store, or other encoders. Where the model's directory has no text
        encoders, there is nothing to compare with, and the store is trusted.
    """
    store = EmbeddingStore(directory)
    if not any((root / e.part).is_dir() for e in read_family(root).text_encoders):
        logging.warning("%s has no text encoders: %s cannot be checked.", root, directory)
        return store
    if store.fingerprint != encoders_mark(root, dtype, t5_length):
        raise WeightsError(
            f"{directory}: was made by other text encoders, or with another dtype or t5_length, "
            f"than {root} and config.model have; run pec_jax.embed again into a new directory"
        )
    return store


def encode(stack: TextStack, prompts: Sequence[str]) -> tuple[Embeddings, np.ndarray]:
    """Embeddings of prompts, each encoded once, and the row [N] of each prompt."""
    unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    embeddings = EmbeddingsInMemory(stack.encode(list(unique)))
    return embeddings, np.array([unique[prompt] for prompt in prompts])
