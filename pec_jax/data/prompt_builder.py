"""Prompt files as TFDS data sets; imported only where a set is opened, as TFDS is slow to load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from pec_jax.data.prompts import PromptError, read_prompts

SPLIT = "prompts"


class PromptBuilder(  # type: ignore[call-arg]  # TFDS carries no types
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Prepares one prompt file as an array_record data set, in the order of the file."""

    VERSION = tfds.core.Version("1.0.0")
    name = "prompt_set"
    # TFDS would look for the checksums of downloads beside the code, with a package that it does
    # not declare (importlib_resources). There are no downloads.
    code_path = None

    def __init__(self, *, path: epath.Path, **kwargs: Any):
        """Args: path: the prompt file. kwargs: as in TFDS."""
        self._path = path
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text prompts, each with metadata as JSON.",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "metadata": tfds.features.Text()}
            ),
            disable_shuffling=True,  # the order of the file is the numbering of the prompts
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for index, prompt in enumerate(read_prompts(self._path)):
            yield index, {"text": prompt.text, "metadata": json.dumps(prompt.metadata)}

    # These two announce downloads on stdout, and there are none.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def open_records(path: epath.Path, checksum: str, cache_dir: Path) -> Sequence[dict[str, bytes]]:
    """Opens the prepared data set of a prompt file; prepares it if it is not there.

    Args:
      path: the prompt file.
      checksum: of its content, which names the data set.
      cache_dir: under which data sets lie.

    Returns:
      A random-access TFDS data source.

    Raises:
      PromptError: the file is unusable, or the prepared set is broken.
      OSError: the cache directory cannot be written.
    """
    tfds.disable_progress_bar()
    builder = PromptBuilder(path=path, data_dir=cache_dir / checksum[:32])
    if not _is_prepared(builder):
        _prepare(builder)
    try:
        records = builder.as_data_source(split=SPLIT)
        if len(records) != builder.info.splits[SPLIT].num_examples:
            raise ValueError(f"{len(records)} records instead of those announced")
        if records[len(records) - 1]["text"] is None:
            raise ValueError("its last record is unreadable")
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise PromptError(
            f"The prepared prompt set {builder.data_dir} is broken ({error}). "
            "Delete that directory; it is made anew at the next start."
        ) from error
    return records


def _is_prepared(builder: PromptBuilder) -> bool:
    """Whether the data set is there (the builder's own check warns when it is not)."""
    return (builder.data_path / "dataset_info.json").exists()


def _prepare(builder: PromptBuilder) -> None:
    """Writes the data set into a temporary directory and renames it when it is whole."""
    config = tfds.download.DownloadConfig(
        compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
    )
    try:
        builder.download_and_prepare(
            download_dir=builder.data_dir_root / "downloads",
            download_config=config,
            file_format="array_record",
        )
    except OSError:
        # Another process that started at the same time may have been the first to rename.
        if not _is_prepared(builder):
            raise
        builder.info.read_from_directory(builder.data_dir)
    finally:
        shutil.rmtree(builder.data_dir_root / "downloads", ignore_errors=True)
