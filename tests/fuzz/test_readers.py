"""Every reader of outside data, on files that are damaged at random: a result or one sentence.

The same examples every time, unless FUZZ_SECONDS says for how long each is tried, and FUZZ_SEED
where to begin:

    FUZZ_SECONDS=3600 FUZZ_SEED=1 pytest tests/fuzz -n 2
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz import watch
from tests.fuzz.mutations import Edit, apply, edits
from tests.fuzz.readers import READERS
from tests.fuzz.watch import watched

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
ROUND = 100  # examples between two looks at the clock


@pytest.fixture
def original(tmp_path, request):
    place = tmp_path / "original"
    place.mkdir()
    READERS[request.getfixturevalue("name")].write(place)
    return place


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_answered(name, original, record_property):
    reader = READERS[name]
    with watched(original):
        reader.read(original)  # what is right is read; modules are imported, for once
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    tried = 0

    def attempt(changes: list[Edit]) -> None:
        nonlocal tried
        tried += 1
        with tempfile.TemporaryDirectory(dir=original.parent) as temporary:
            place = Path(temporary) / "damaged_files"
            shutil.copytree(original, place)
            for change in changes:
                apply(change, [place / file for file in files])
            with watched(place):
                reader.read(place)

    end, number = time.monotonic() + SECONDS, 0
    while not number or time.monotonic() < end:
        options = settings(
            max_examples=ROUND,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        seed(1000 * SEED + number)(options(given(edits)(attempt)))()
        number += 1
    record_property("examples", tried)
    print(f"{name}: {tried} examples")


def test_the_watch_sees_what_is_not_allowed(tmp_path, monkeypatch):
    """Each by an example that must be caught."""
    import subprocess

    from tests.fuzz.watch import NotAllowedError

    monkeypatch.setattr(watch, "SECONDS", 1)

    def elsewhere() -> None:
        Path("/etc/hostname").read_bytes()

    def writes() -> None:
        (tmp_path / "new").write_text("a")

    def starts() -> None:
        subprocess.run(["true"], check=True)

    def nameless() -> None:
        raise ValueError("bad")

    def hangs() -> None:
        time.sleep(60)

    def swells() -> None:
        np.ones(2 * watch.MEMORY, np.uint8).sum()

    for action in (elsewhere, writes, starts, nameless, hangs, swells):
        with pytest.raises(NotAllowedError), watched(tmp_path):
            action()
    with watched(tmp_path):
        raise ValueError(f"{tmp_path}: not so")
