"""The campaign of faults: a little of it, and what it would call a failure."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fault_kinds, fault_runs, faults

ROOT = Path(__file__).parents[2]
FEW = ("kill_in_checkpoint", "stop_once", "damaged_checkpoints")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A campaign of three faults: (what it printed, its directory of runs, of results)."""
    scratch, out = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("out")
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", f"--scratch={scratch}",
               f"--out={out}", "--quick", f"--only={','.join(FEW)}", "--jobs=1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return command, scratch, out


def test_runs_go_on_bit_for_bit_or_are_answered(campaign):
    _, _, out = campaign
    records = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    assert sorted(record["kind"] for record in records) == sorted(FEW)
    assert {record["result"] for record in records} <= {fault_kinds.RESUMED, fault_kinds.TOLD}
    assert "| **all** | 3 |" in (out / "table.txt").read_text()


def test_what_was_tried_is_not_tried_again(campaign):
    done = subprocess.run(campaign[0], capture_output=True, text=True, timeout=300, check=False)
    assert "3 faults tried before, 0 to go." in done.stdout


def test_a_difference_is_seen(campaign, tmp_path):
    _, scratch, _ = campaign
    alone = scratch / "alone_1"
    assert not fault_runs.difference(alone, alone)
    other = tmp_path / "other"
    shutil.copytree(alone, other)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    assert fault_runs.difference(other, alone).startswith("metrics.jsonl: steps")
    assert not fault_runs.difference(other, alone, metrics=False)
    last = other / "checkpoints" / str(fault_runs.LENGTH)
    shutil.rmtree(last / "state")
    shutil.copytree(alone / "checkpoints" / "6" / "state", last / "state")
    assert fault_runs.difference(other, alone, metrics=False).endswith("differs")


def test_an_evaluation_without_its_judge_is_excused_and_nothing_else():
    whole = {"step": 6, "quality/a": 1.0, "quality/faulty": 0.5, "quality/faulty/low": 0.4}
    failed = {"step": 6, "quality/a": 1.0, "failures/faulty": 1.0}
    assert fault_runs._alike([failed], [whole], "faulty")
    assert not fault_runs._alike([failed], [whole], "")
    assert not fault_runs._alike([{**failed, "quality/a": 2.0}], [whole], "faulty")
    assert not fault_runs._alike([{**whole, "quality/faulty": 0.6}], [whole], "faulty")


def test_every_kind_has_its_number_and_says_what_it_does():
    count = sum(whole for _, whole, _ in fault_kinds.KINDS.values())
    assert count >= 300
    assert f"has {count} faults" in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for function, _, _ in fault_kinds.KINDS.values():
        assert function.__doc__


def test_the_same_seed_does_the_same_damage(tmp_path):
    def damaged(number: int) -> tuple[str, bytes]:
        path = tmp_path / "a" / "b" / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(256)))
        how = fault_kinds.damage(random.Random(number), path)
        return how, path.read_bytes() if path.exists() else b"gone"

    assert [damaged(i) for i in range(20)] == [damaged(i) for i in range(20)]
    assert len({damaged(i)[0].partition(" ")[2] for i in range(20)}) == 4
    assert all(damaged(i)[1] != bytes(range(256)) for i in range(20))


def test_the_plan_tries_a_little_of_all_first():
    plan = faults.plan()
    assert {fault.kind for fault in plan[: len(fault_kinds.KINDS)]} == set(fault_kinds.KINDS)
    assert len(plan) == len(set(plan))
