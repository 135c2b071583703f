"""Memory per chip of every config as it ships: `python benchmarks/config_memory.py --results=DIR`.

Compiles the train step of each for the slice that its docstring names, and prints what the line
`Memory:` there has to say; tests compare it. One process per config; what lies in --results is not
compiled again. Minutes for a published model on two cores. Needs `pip install -e '.[tpu]'`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for this directory by its name

from benchmarks.ahead import asked  # noqa: E402

MEMORY = re.compile(r"^Memory: [\d.?]+ of [\d.?]+ GB per chip on (v\w+:[\dx]+)", re.MULTILINE)


def topologies() -> dict[str, str]:
    """The slice that each config's docstring names, by the config's name."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        if match := MEMORY.search(path.read_text(encoding="utf-8")):
            found[path.stem] = match[1]
    return found


def report(name: str, topology: str, results: Path) -> dict[str, Any]:
    """What aot says of a config, or said before."""
    arguments = [f"--config=configs/{name}.py", f"--topology={topology}"]
    return asked(arguments, results / f"{name}.json")


def sentence(found: dict[str, Any]) -> str:
    """The line of the docstring."""
    peak, chip = found["bytes_per_chip"]["peak"] / 1e9, found["hbm_bytes"] / 1e9
    return f"Memory: {peak:.2f} of {chip:.1f} GB per chip on {found['topology']}"


def main(argv: list[str]) -> None:
    """Compiles what is missing, and prints a line per config."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    results = Path(_RESULTS.value).absolute()
    results.mkdir(parents=True, exist_ok=True)
    for name, topology in topologies().items():
        if name in _ONLY.value or not _ONLY.value:
            print(f"{name}: {sentence(report(name, topology, results))}", flush=True)


if __name__ == "__main__":
    _RESULTS = flags.DEFINE_string("results", "runs/config_memory", "Where finished ones lie.")
    _ONLY = flags.DEFINE_list("only", [], "Configs, such as sd3_pec,flux_pec; all if none.")
    app.run(main)
