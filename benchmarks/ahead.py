"""What `python -m pec_jax.aot` says of a config, kept in a file so that it is asked once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def asked(arguments: list[str], path: Path) -> dict[str, Any]:
    """The JSON object of aot, read from `path` or, if there is none, compiled and written there.

    Exits with the name of aot's log where the compilation fails.
    """
    if not path.exists():
        start, log = time.perf_counter(), path.with_suffix(".log")
        with log.open("w", encoding="utf-8") as errors:
            done = subprocess.run(
                [sys.executable, "-m", "pec_jax.aot", *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                check=False,
            )
        if done.returncode:
            sys.exit(f"Error: {path.stem} failed; see {log}")
        path.write_bytes(done.stdout)
        log.unlink()
        print(f"{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))
