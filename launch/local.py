"""Several processes that train together, on this machine:

    python launch/local.py 2 --config=configs/shapes_pec.py --workdir=runs/two [--config.a.b=v]

On GPUs each process takes one: as many as there are processes. On a CPU each has one device, or
JAX_NUM_CPU_DEVICES. Lines are prefixed by the process they come from. The first Ctrl-C or SIGTERM
makes all save and stop, the second kills them. Where one fails, it is named and the others are
stopped; its status is this program's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

GRACE_SECONDS = 10  # of the others, once one has failed: what they wait for will never come


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def commands(processes: int, arguments: Sequence[str]) -> list[list[str]]:
    """The command of each process."""
    train = [sys.executable, "-m", "pec_jax.main", *arguments, "--distributed"]
    train += [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
    return [[*train, f"--process_id={i}"] for i in range(processes)]


def environment(process: int, ours: Mapping[str, str] = os.environ) -> dict[str, str]:
    """One device each, where nothing else is set."""
    result = {"JAX_LOCAL_DEVICE_IDS": str(process), "PYTHONUNBUFFERED": "1"}
    if "xla_force_host_platform_device_count" not in ours.get("XLA_FLAGS", ""):
        result["JAX_NUM_CPU_DEVICES"] = "1"
    return result | dict(ours)


def run(lines: Sequence[Sequence[str]]) -> int:
    """Runs the commands at the same time; 0, or the status of the first one that fails."""
    processes: list[subprocess.Popen[str]] = []
    signals = 0

    def send(number: int) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def forward(number: int, frame: Any) -> None:
        nonlocal signals
        signals += 1
        # SIGTERM either way: it is what JAX listens to when several processes train together.
        send(signal.SIGTERM if signals == 1 else signal.SIGKILL)

    def tell_of_failures() -> None:
        if signals > 1:
            return  # whoever sent them knows
        ended = [(i, p.returncode) for i, p in enumerate(processes) if p.poll()]
        sentences = [f"process {i} {_ending(status)}." for i, status in ended]
        if any(process.poll() is None for process in processes):
            sentences.append("The others are stopped.")
        print(f"Error: {' '.join(sentences)}", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for i, line in enumerate(lines):
        process = subprocess.Popen(
            line,
            env=environment(i),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C at the terminal comes here alone
        )
        processes.append(process)
    threads = [threading.Thread(target=_copy, args=(i, p)) for i, p in enumerate(processes)]
    for thread in threads:
        thread.start()

    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes):
        if not failed and (failed := _failure(processes)):
            tell_of_failures()
            send(signal.SIGTERM)
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            send(signal.SIGKILL)
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    if not failed and (failed := _failure(processes)):  # of the last ones, between two looks
        tell_of_failures()
    return failed


def _failure(processes: Sequence[subprocess.Popen[str]]) -> int:
    """The exit status of one that failed, as a shell gives it; 0 if none did."""
    status = next((p.returncode for p in processes if p.poll()), 0)
    return 128 - status if status < 0 else status


def _ending(returncode: int) -> str:
    """How a process that failed has ended, in words."""
    if returncode > 0:
        return f"ended with status {returncode}; its last lines say why"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    memory = ", as the system does when memory runs out" if returncode == -signal.SIGKILL else ""
    return f"was killed by {name} (status {128 - returncode}){memory}"


def _copy(number: int, process: subprocess.Popen[str]) -> None:
    """A process's output, as it comes; a progress bar's carriage return ends a line too."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(f"[{number}] {line.rstrip()}\n")  # in one piece, for there are several
        sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Parses the number and starts the processes."""
    if not arguments or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        print(__doc__, file=sys.stdout if "--help" in arguments else sys.stderr)
        return 0 if "--help" in arguments else 2
    return run(commands(int(arguments[0]), arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
