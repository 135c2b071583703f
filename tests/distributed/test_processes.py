"""Several processes on this machine train as one, stop together, and go on as another number."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pec_jax.config.registry import REWARDS
from pec_jax.inference import export as exporting
from tests.conftest import EXHAUSTIVE

ROOT = Path(__file__).parents[2]
MAIN = ("-m", "pec_jax.main")
HOST_REWARD = ("-c", "import tests.distributed.redness, pec_jax.main as m; m.run()")
OVERRIDES = {
    "num_iterations": 3,
    "trainable.rank": 4,
    "sampler.num_steps": 3,
    "batch.groups": 4,
    "batch.group_size": 4,
    "updates.minibatches": 2,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "optimizer.eps": 1e-3,  # 1e-8 would blow the rounding of tiny gradients up to whole steps
    "eval.num_prompts": 2,
    "eval.groups": 2,
    "eval.images_per_prompt": 4,
    "eval.num_steps": 3,
    "eval.sample_rows": 2,
    "eval.sample_columns": 2,
    "eval.entropy_probes": 0,
    "schedule.sample_every": 0,
    "schedule.checkpoint_every": 0,
}


def start(workdir: Path, count: int, program=MAIN, **changes) -> list[subprocess.Popen]:
    """`count` processes of one device each, which train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fields = {**OVERRIDES, **{k.replace("__", "."): v for k, v in changes.items()}}
    command = [
        sys.executable,
        *program,
        f"--config={ROOT / 'configs' / 'shapes_grpo.py'}",
        f"--workdir={workdir}",
        "--allow_config_change",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        # Runs on as many processes share what they compile.
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parents[1] / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    processes = []
    for i in range(count):
        joined = [
            "--distributed",
            f"--coordinator=localhost:{port}",
            f"--num_processes={count}",
            f"--process_id={i}",
        ]
        log = (workdir.parent / f"{workdir.name}_{i}.txt").open("w")
        processes.append(
            subprocess.Popen(
                command + joined * (count > 1), env=environment, stdout=log, stderr=log, cwd=ROOT
            )
        )
    return processes


def finish(workdir: Path, processes: list[subprocess.Popen]) -> None:
    codes = [process.wait(timeout=900) for process in processes]
    logs = [(workdir.parent / f"{workdir.name}_{i}.txt").read_text() for i in range(len(codes))]
    assert codes == [0] * len(codes), "\n".join(log[-2000:] for log in logs)


def steps(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "reward/mean" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(workdir, start(workdir, 1))
    return workdir


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected):
        for name in b:
            if not name.startswith("time/") and name != "policy/logp_drift":
                # A pixel on the edge of two 8-bit levels may fall to either side, which shows in
                # rewards and what follows from them; seen: 1.6e-5.
                close = 1e-5 if name == "policy/loss" else 1e-4
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=close), name


def learned(workdir: Path) -> dict[str, np.ndarray]:
    """The LoRA of a run's newest checkpoint."""
    out = workdir.parent / f"{workdir.name}_lora"
    exporting.run(workdir, "lora", out, use_ema=False)
    return load_file(out / exporting.FILES["lora"][0])


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Metrics, what was learned, and the evaluation."""
    assert_same(steps(workdir), steps(expected))
    parameters = learned(expected)
    for name, value in learned(workdir).items():
        np.testing.assert_allclose(value, parameters[name], atol=1e-5, rtol=0, err_msg=name)
    ours, theirs = (json.loads((w / "eval.json").read_text()) for w in (workdir, expected))
    for name, value in theirs.items():
        if name.startswith(("quality/", "diversity/")):
            assert ours[name] == pytest.approx(value, rel=1e-3), name  # 8-bit levels may flip


@pytest.mark.parametrize("count", [2, 4] if EXHAUSTIVE else [2])
def test_several_processes_compute_what_one_does(tmp_path, alone, count):
    workdir = tmp_path / "run"
    finish(workdir, start(workdir, count))
    assert_same_run(workdir, alone)


def test_a_host_reward_of_several_processes_is_that_of_one(tmp_path, monkeypatch):
    """Each process asks its own function about its own groups."""
    monkeypatch.setattr(REWARDS, "_entries", {name: REWARDS[name] for name in REWARDS})
    importlib.import_module("tests.distributed.redness")  # for who reads the runs' configs
    changes = {"num_iterations": 2, "rewards.redness.weight": 2.0}
    runs = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    for count, workdir in enumerate(runs, start=1):
        workdir.parent.mkdir()
        finish(workdir, start(workdir, count, HOST_REWARD, **changes))
    assert_same_run(runs[1], runs[0])
    for line in steps(runs[1]):
        total = line["reward/pickscore"] + 2 * line["reward/redness"]
        assert line["reward/mean"] == pytest.approx(total, rel=1e-5)
        assert abs(line["reward/redness"]) > 1e-3
    assert "quality/redness" in json.loads((runs[1] / "eval.json").read_text())


def test_a_sigterm_to_one_stops_and_saves_all_and_another_number_resumes(tmp_path, alone):
    workdir = tmp_path / "run"
    processes = start(workdir, 2, num_iterations=60)
    deadline = time.monotonic() + 600
    while not (workdir / "metrics.jsonl").exists() or len(steps(workdir)) < 2:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    finish(workdir, processes)
    assert not (workdir / "eval.json").exists()
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 2 <= saved < 60
    finish(workdir, start(workdir, 1, num_iterations=saved + 1))
    found = steps(workdir)
    assert [line["step"] for line in found] == list(range(1, saved + 2))
    assert_same(found[:2], steps(alone)[:2])


def test_a_start_that_the_first_process_refuses_ends_all_of_them(tmp_path):
    """A file where the directory should be, as the first process finds out."""
    workdir = tmp_path / "file"
    workdir.write_text("mine")
    processes = start(workdir, 2)
    assert [process.wait(timeout=300) for process in processes] == [2, 2]
    first, second = ((tmp_path / f"file_{i}.txt").read_text() for i in range(2))
    assert "file is a file. Give the name of a directory" in first
    assert "process 0 could not go on; its own message says why" in second
    assert "Traceback" not in first + second and workdir.read_text() == "mine"
