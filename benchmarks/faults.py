"""A campaign of faults: `python benchmarks/faults.py --scratch=DIR --out=docs/results/faults`.

Small runs of the embedded model are killed, stopped, starved of disk and damaged, some hundred
times, at moments that follow from a seed. After each fault the same command runs again, and either
the run ends as one that was left alone, every iteration once and every number bit for bit, or the
damage is answered with a sentence. Whatever has been tried is not tried again: the campaign can be
stopped, and goes on. `faults.jsonl` has a line per fault, `table.txt` a row per kind.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fault_kinds import KINDS, RESUMED, TOLD, FaultError
from benchmarks.fault_runs import Lab


@dataclasses.dataclass(frozen=True)
class Fault:
    """One of a kind."""

    kind: str
    number: int

    @property
    def name(self) -> str:
        """Of its directory and in messages."""
        return f"{self.kind}_{self.number:03d}"


def main(argv: Sequence[str]) -> None:
    """Tries what has not been tried, and writes the table; status 1 if anything failed."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # also of this process, which reads checkpoints
    logging.set_verbosity(logging.ERROR)  # of orbax
    out, scratch = Path(_OUT.value), Path(_SCRATCH.value).absolute()
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "faults.jsonl"
    done = _read(lines)
    faults = [
        fault for fault in plan(_ONLY.value, _QUICK.value) if (fault.kind, fault.number) not in done
    ]
    print(f"{len(done)} faults tried before, {len(faults)} to go.", flush=True)
    _try_all(Lab(scratch), faults, lines)
    results = _read(lines)
    (out / "table.txt").write_text(table(results), encoding="utf-8")
    print(table(results))
    failed = [record for record in results.values() if record["result"] not in (RESUMED, TOLD)]
    for record in failed:
        print(f"{record['kind']} {record['number']}, {record['detail']}: {record['result'][:3000]}")
    sys.exit(bool(failed))


def plan(only: Sequence[str] = (), quick: bool = False) -> list[Fault]:
    """The kinds in turn, so that a campaign that is stopped early has tried a little of all.

    Args:
        only: kinds; all if there are none.
        quick: a few of most.
    """
    chosen = {kind: KINDS[kind][1 + quick] for kind in only or KINDS}
    most = max(chosen.values())
    return [Fault(k, i) for i in range(most) for k, count in chosen.items() if i < count]


def _try_all(lab: Lab, faults: Sequence[Fault], lines: Path) -> None:
    lab.reference()
    lock, begun = threading.Lock(), time.monotonic()

    def attempt(fault: Fault) -> None:
        if _MINUTES.value and time.monotonic() - begun > 60 * _MINUTES.value:
            return
        record = _try(lab, fault)
        with lock, lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            print(f"{fault.name}: {record['result'][:200]} ({record['detail']})", flush=True)

    with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
        list(pool.map(attempt, faults))


def _try(lab: Lab, fault: Fault) -> dict[str, object]:
    """One fault, in a directory of its own, which is kept if it failed."""
    place = lab.scratch / "faults" / fault.name
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{_SEED.value} {fault.kind} {fault.number}")
    record: dict[str, object] = {"kind": fault.kind, "number": fault.number, "seed": _SEED.value}
    try:
        outcome = KINDS[fault.kind][0](lab, rng, place)
    except (FaultError, OSError) as error:
        return record | {"result": f"FAILED: {error}", "detail": "", "phase": "", "seconds": 0.0}
    for path in place.parent.glob(f"{fault.name}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (lab.scratch / "logs").glob(f"faults_{fault.name}*"):
        path.unlink()
    return record | dataclasses.asdict(outcome)


def _read(lines: Path) -> dict[tuple[str, int], Mapping[str, object]]:
    """What has been tried; of one that was tried twice, the last."""
    if not lines.exists():
        return {}
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return {(r["kind"], r["number"]): r for r in records if r["seed"] == _SEED.value}


def table(results: Mapping[tuple[str, int], Mapping[str, object]]) -> str:
    """A row per kind: faults, went on, told, failed; slowest end."""
    heading = [
        "| what was done | faults | went on, bit for bit | answered with a sentence | failed | "
        "ended within |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    total: Counter[str] = Counter()
    rows = []
    for kind, (function, _, _) in KINDS.items():
        records = [record for (name, _), record in results.items() if name == kind]
        if not records:
            continue
        counts = Counter(
            str(r["result"]) if r["result"] in (RESUMED, TOLD) else "failed" for r in records
        )
        total += counts
        slowest = max(float(str(r["seconds"])) for r in records)
        what = (function.__doc__ or kind).strip().splitlines()[0].rstrip(".")
        cells = [len(records), counts[RESUMED], counts[TOLD], counts["failed"]]
        rows.append(f"| {what} | {' | '.join(map(str, cells))} | {slowest:.0f} s |")
    cells = [sum(total.values()), total[RESUMED], total[TOLD], total["failed"]]
    rows.append(f"| **all** | {' | '.join(map(str, cells))} | |")
    return "\n".join([*heading, *rows]) + "\n"


if __name__ == "__main__":
    _SCRATCH = flags.DEFINE_string("scratch", None, "Directory for the runs.", required=True)
    _OUT = flags.DEFINE_string(
        "out", None, "Directory of faults.jsonl and table.txt.", required=True
    )
    _JOBS = flags.DEFINE_integer("jobs", 2, "Faults at a time.", lower_bound=1)
    _SEED = flags.DEFINE_integer("seed", 0, "From which all moments and choices follow.")
    _QUICK = flags.DEFINE_bool("quick", False, "A few faults of most kinds, in minutes.")
    _ONLY = flags.DEFINE_list("only", [], "Kinds; all by default.")
    _MINUTES = flags.DEFINE_float("minutes", 0.0, "No fault is begun after so many; 0 is no end.")
    app.run(main)
