"""Prompt files: reading, checking, and opening them as random-access sources.

A prompt set is a file, either `.txt` with one prompt a line or `.jsonl` with one object a line,
whose field "prompt" holds the text and whose other fields are metadata for rewards, and for the
sampler "negative_prompt". `load_prompts` turns it, once, into an array_record data set under the
cache directory and reads that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from etils import epath

from pec_jax import io

SUFFIXES = (".txt", ".jsonl")
MAX_LINE_CHARS = 10_000
MAX_PROMPTS = 10_000_000
NEGATIVE = "negative_prompt"  # the field of a line that the sampler reads
_SURROGATE = re.compile("[\ud800-\udfff]")
_FORMAT = b"2"  # of the prepared data set; part of its checksum


class PromptError(ValueError):
    """A prompt file cannot be used; the message says which line, why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      text: what the image shall show.
      metadata: what a reward may want to know besides, e.g. GenEval's expected objects.
    """

    text: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def negative(self) -> str | None:
        """What guidance steers away from, where the prompt has its own."""
        return self.metadata.get(NEGATIVE)


class PromptSource(Sequence[Prompt]):
    """Random access to the prompts of a prepared data set, in the order of the file."""

    def __init__(self, records: Any):
        """Args: records: TFDS data source of {"text": bytes, "metadata": JSON bytes}."""
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"Prompt {index} of a set of {size}.")
        record = self._records[int(index) % size]
        if record["text"] is None:  # array_record passes over damaged blocks in silence
            raise PromptError(
                f"Prompt {index} of the prepared set {self._records.dataset_info.data_dir} is "
                "unreadable. Delete that directory; it is made anew at the next start."
            )
        return Prompt(record["text"].decode("utf-8"), json.loads(record["metadata"]))


def cache_directory() -> Path:
    """Where prepared prompt sets are kept."""
    return io.cache_directory() / "prompts"


def check_file(path: str | os.PathLike) -> epath.Path:
    """The path of a prompt file that exists and is of a known kind.

    Raises:
      PromptError: there is no such file, or its name does not end in .txt or .jsonl.
    """
    file = io.path(path)
    if not file.is_file():
        problem = "is a directory" if file.is_dir() else "does not exist"
        raise PromptError(f"The prompt file {file} {problem}. Give the path of a file.")
    if file.suffix not in SUFFIXES:
        raise PromptError(
            f"The prompt file {file} must end in {' or '.join(SUFFIXES)}: plain text with one "
            'prompt a line, or one JSON object with a field "prompt" a line.'
        )
    return file


def _read_lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, stripped line) of those that are not blank.

    A line ends in LF, CR LF or CR.
    """
    limit = 4 * MAX_LINE_CHARS  # spaces around a line do not count
    source = io.local_copy(path)
    with source.open("rb") as file:
        if other := io.other_encoding(file.read(io.TOLD_BYTES)):
            raise PromptError(f"{path} is {other}, not UTF-8. {io.recode_advice(path, other)}")
    # A byte that is not UTF-8 becomes a lone surrogate, which UTF-8 has not.
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
        number = 0
        while line := file.readline(limit):
            number += 1
            if found := _SURROGATE.search(line):
                before = line[: found.start()].encode("utf-8")
                raise PromptError(
                    f"{path}, line {number}: byte {len(before) + 1} is not UTF-8. "
                    f"{io.recode_advice(path)}"
                )
            stripped = line.strip()
            if len(stripped) > MAX_LINE_CHARS or len(line) == limit:
                raise PromptError(
                    f"{path}, line {number}: longer than {MAX_LINE_CHARS} characters. "
                    "Is it really one prompt a line?"
                )
            if "\0" in stripped:
                raise PromptError(
                    f"{path}, line {number}: holds a zero byte, which no text does. "
                    "Is it really a text file?"
                )
            if stripped:
                yield number, stripped


def _parse_json(line: str) -> Prompt:
    """Reads one line of a .jsonl file; a ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
        check_text(json.dumps(record, ensure_ascii=False))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    text = record.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError('the field "prompt" must be there and hold a text')
    if not isinstance(record.get(NEGATIVE, ""), str):
        raise ValueError(f'the field "{NEGATIVE}" must hold a text')
    return Prompt(text.strip(), record)


def check_text(text: str) -> None:
    """Raises ValueError for a half of a character, which no file and no tokenizer can hold."""
    if found := _SURROGATE.search(text):
        code = ord(found[0])
        if 0xDC80 <= code <= 0xDCFF:  # so Python hands on bytes of a command line
            raise ValueError(f"the byte 0x{code - 0xDC00:02X} in {text!a} is not UTF-8")
        raise ValueError(
            f"\\u{code:04x} is one half of a character (a lone surrogate); characters beyond "
            "\\uffff are written as two such halves, or as they are"
        )


def read_prompts(path: str | os.PathLike) -> Iterator[Prompt]:
    """Reads a prompt file line by line, without any cache.

    Args:
      path: a .txt or .jsonl file; blank lines are passed over.

    Yields:
      The prompts, at least one.

    Raises:
      PromptError: the file is missing, of another kind, empty, not UTF-8, too long (10 M prompts),
        or one of its lines is too long (10 000 characters), no text, or not a JSON object with a
        "prompt".
    """
    file = check_file(path)
    count = 0
    for number, line in _read_lines(file):
        count += 1
        if count > MAX_PROMPTS:
            raise PromptError(f"{file}: more than {MAX_PROMPTS} prompts. Split the file.")
        if file.suffix == ".txt":
            yield Prompt(line)
            continue
        try:
            yield _parse_json(line)
        except ValueError as error:
            raise PromptError(f"{file}, line {number}: {error}. Correct the line.") from error
    if not count:
        raise PromptError(f"The prompt file {file} is empty. Write one prompt a line into it.")


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a prompt file's content and kind, 64 hexadecimal digits."""
    file = check_file(path)
    digest = hashlib.sha256(_FORMAT + file.suffix.encode() + b"\0")
    with io.local_copy(file).open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_prompts(
    path: str | os.PathLike, cache_dir: str | os.PathLike | None = None
) -> PromptSource:
    """Opens a prompt file as a random-access source, prepared on the first use.

    The prepared data set is found again by the file's checksum, so that an edited file is prepared
    anew and an unchanged one opens at once.

    Args:
      path: a .txt or .jsonl file.
      cache_dir: where to keep the prepared set; `cache_directory()` if None.

    Returns:
      A sequence of prompts in the order of the file.

    Raises:
      PromptError: as `read_prompts`, or the cache directory cannot be written or read.
    """
    # TFDS takes its time to import, and those who only want a `Prompt` do not need it.
    from pec_jax.data import prompt_builder

    file = check_file(path)
    directory = Path(cache_dir).expanduser() if cache_dir else cache_directory()
    try:
        return PromptSource(prompt_builder.open_records(file, checksum(file), directory))
    except (OSError, RuntimeError) as error:  # of array_record, when the disk is full
        raise PromptError(
            f"Cannot prepare the prompt file {file} in {directory}: {error}. "
            f"Make room there, or set {io.CACHE_VARIABLE} to a directory that can be written."
        ) from error
