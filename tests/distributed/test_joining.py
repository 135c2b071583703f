"""Processes that cannot find each other say so in a sentence, in time, and end with status 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from pec_jax.distributed import joining
from pec_jax.errors import RunError


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(coordinator: str, count: int, number: int, timeout: int = 3) -> subprocess.Popen[str]:
    """A process that joins the others and does no more."""
    code = (
        "from pec_jax.distributed import joining\n"
        "from pec_jax.errors import exit_on_user_error\n"
        "with exit_on_user_error():\n"
        f"    joining.join({coordinator!r}, {count}, {number}, timeout={timeout})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def assert_ends(process: subprocess.Popen[str], *parts: str) -> None:
    """Its status is 2, and all it prints is one sentence that has these parts."""
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert error.startswith("Error: ") and error.count("\n") == 1, error
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    "coordinator",
    ["nonsense", "", "localhost", "localhost:", "localhost:0", "localhost:99999", ":1234",
     "http://localhost:1234", "localhost:12 34", "::1:80"],
)  # fmt: skip
def test_what_is_no_address(coordinator):
    with pytest.raises(RunError, match=r"is not host:port of process 0, as in 10\.0\.0\.2:1234"):
        joining.join(coordinator, 2, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost:1", ("localhost", 1)),
        ("pod-0.svc:65535", ("pod-0.svc", 65535)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_what_is_an_address(text, expected):
    assert joining._parse(text) == expected and str(joining._parse(text)) == text


def test_a_process_that_is_none_of_them():
    with pytest.raises(RunError, match="--process_id=2 is none of --num_processes=2"):
        joining.join("localhost:1", 2, 2)


def test_an_address_of_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nonsense")
    with pytest.raises(RunError, match="nonsense is not host:port"):
        joining.join(None, 2, 1)


def test_process_0_does_not_answer():
    begun = time.monotonic()
    assert_ends(
        start("localhost:1", 2, 1),
        "could not join the other processes (coordinator='localhost:1', num_processes=2, "
        "process_id=1) in 3 s: process 0 does not answer at localhost:1 (Connection refused).",
        "--join_timeout",
    )
    assert time.monotonic() - begun < 60


def test_the_others_do_not_come():
    """Neither process 0 nor one that found it goes on, or dies of the other's end."""
    address = f"localhost:{free_port()}"
    waiting = [start(address, 3, 0), start(address, 3, 1, timeout=6)]
    assert_ends(waiting[0], f"in 3 s: not all of them have come to {address}.")
    assert_ends(waiting[1], "in 6 s: process 0 does not answer")


def test_process_0_is_elsewhere():
    assert_ends(
        start("192.0.2.1:12345", 2, 0, timeout=2),  # an address that nobody has
        "process 0 does not reach itself at 192.0.2.1:12345",
    )


def test_the_port_is_taken():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RunError, match=f"cannot listen on port {port}: Address already in use"):
            joining.join(f"localhost:{port}", 2, 0)


def test_those_who_come_in_time_join():
    address = f"localhost:{free_port()}"
    processes = [start(address, 2, number, timeout=60) for number in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error


def test_the_flag(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pec_jax.main",
        "--config=shapes_pec",
        f"--workdir={tmp_path / 'run'}",
        "--distributed",
        "--coordinator=localhost:1",
        "--num_processes=2",
        "--process_id=1",
        "--join_timeout=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "in 1 s: process 0 does not answer" in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_of_several_hosts_does_not_run_alone():
    with pytest.raises(RunError, match="add --distributed"):
        joining.refuse_unjoined_process({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"})
    with pytest.raises(RunError, match="SLURM_STEP_NUM_TASKS=2"):
        joining.refuse_unjoined_process({"SLURM_STEP_NUM_TASKS": "2"})
    joining.refuse_unjoined_process(
        {"TPU_WORKER_HOSTNAMES": "localhost", "SLURM_STEP_NUM_TASKS": "1"}
    )
    joining.refuse_unjoined_process({})
