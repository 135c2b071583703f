"""The study's finished runs in one small file, from which its tables can be made without training.

Of each run: config.json, eval.json, eval_base.json and metrics.jsonl, its numbers to 5 digits but
for the policy's entropy, of which it matters that it does not move. No checkpoints and no images.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

NAME = "runs.tar.xz"
KEPT = ("config.json", "eval.json", "eval_base.json", "metrics.jsonl")
DIGITS, EXACT = 5, ("entropy/policy",)


def pack(runs: Path, out: Path) -> Path:
    """Writes every finished run below `runs` into `out`/runs.tar.xz.

    Returns:
        The archive.
    """
    path = out / NAME
    with tarfile.open(path, "w:xz") as archive:
        for finished in sorted(runs.glob("*/*/eval.json")):
            for file in (finished.with_name(name) for name in KEPT):
                if file.exists():
                    _add(archive, str(file.relative_to(runs)), _shortened(file).encode())
    return path


def unpack(out: Path, runs: Path) -> None:
    """Puts the archived runs into `runs`, where they count as finished.

    Raises:
        FileNotFoundError: `out` holds no archive.
        RunError: its runs are of an earlier version; nothing is unpacked.
    """
    from pec_jax.evaluation import run_table

    with tarfile.open(out / NAME) as archive:
        for member in archive:
            if member.name.endswith("/config.json"):
                config = json.load(archive.extractfile(member))
                run_table.check_schema(config, out / NAME / member.name)
        runs.mkdir(parents=True, exist_ok=True)
        archive.extractall(runs, filter="data")  # nothing outside of `runs`, no links, no devices


def check_runs(runs: Path) -> None:
    """Refuses runs of an earlier version, before any training.

    Raises:
        RunError: there is one below `runs`.
    """
    from pec_jax.evaluation import run_table

    for path in sorted(runs.glob("*/*/config.json")):
        run_table.check_schema(json.loads(path.read_text(encoding="utf-8")), path)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner and no time: the same runs make the same file
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _shortened(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    if file.name == "config.json":
        return text
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    return "".join(json.dumps(_rounded(json.loads(line))) + "\n" for line in lines)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.{DIGITS}g}")
        if isinstance(value, float) and key not in EXACT
        else value
        for key, value in values.items()
    }
