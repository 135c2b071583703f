"""How several processes find each other, before anything else touches a device.

JAX's own waiting ends in native code, which prints a dump of its stack and aborts. So what can be
checked beforehand is, and the deadline is kept here, a little earlier than JAX's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from absl import logging

from pec_jax.errors import RunError, report

TIMEOUT_SECONDS = 300  # the last host of a pod may install for minutes
_SPARE_SECONDS = 60  # by which JAX's deadline is later than ours
_PROBE_SECONDS = 2.0
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(\d{1,5})")
_ADVICE = (
    "Start all of them, within --join_timeout seconds, with the same --coordinator, a port of "
    "process 0 that the others reach, the same --num_processes and each its own --process_id."
)


class _Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = TIMEOUT_SECONDS,
) -> None:
    """Joins the processes of a run; before anything else touches a device.

    Where the others do not come in time, a sentence is printed and the process ends with status 2,
    as nothing can interrupt JAX's waiting.

    Args:
      coordinator: host:port of process 0; None where JAX finds all three itself (TPU pods, Slurm,
        MPI, Kubernetes).
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: for how many seconds the others are waited for.

    Raises:
      RunError: what was given cannot be right, or JAX finds nothing itself; a run on one host alone
        would be another experiment.
    """
    given = f"{coordinator=}, {num_processes=}, {process_id=}".replace("=None", " found by JAX")
    known = os.environ.get("JAX_COORDINATOR_ADDRESS") if coordinator is None else coordinator
    address = _parse(known)
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise RunError(
            f"--process_id={process_id} is none of --num_processes={num_processes}, which count "
            "from 0."
        )
    if address and process_id == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(address.port)

    def too_late() -> str:
        return (
            f"could not join the other processes ({given}) in {timeout} s: "
            f"{_what_is_missing(address, process_id)} {_ADVICE}"
        )

    try:
        with _deadline(timeout, too_late):
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=timeout + _SPARE_SECONDS,
            )
        logging.info(
            "Process %d of %d; %d of %d devices are here.",
            jax.process_index(),
            jax.process_count(),
            jax.local_device_count(),
            jax.device_count(),
        )
    except (RuntimeError, ValueError, LookupError, TypeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise RunError(
            f"could not join the other processes ({given}): {reason}. {_ADVICE}"
        ) from None


def _parse(coordinator: str | None) -> _Address | None:
    """Host and port.

    Raises:
      RunError: they are none.
    """
    if coordinator is None:
        return None
    match = _ADDRESS.fullmatch(coordinator)
    if not match or not 0 < int(match[2]) < 2**16:
        raise RunError(
            f"--coordinator={coordinator} is not host:port of process 0, as in 10.0.0.2:1234."
        )
    return _Address(match[1].strip("[]"), int(match[2]))


def _check_port(port: int) -> None:
    """Raises RunError if process 0 cannot listen there, of which JAX would die in native code."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        # Others, such as a kernel without IPv6, are JAX's to find another way around.
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise RunError(
                f"process 0 cannot listen on port {port}: {os.strerror(error.errno)}. Is another "
                "process 0 running? Give all processes a --coordinator with another port."
            ) from None


@contextlib.contextmanager
def _deadline(seconds: float, sentence: Callable[[], str]) -> Iterator[None]:
    """Ends this process with status 2 and a sentence, unless the block ends earlier."""

    def end() -> None:
        report(sentence())
        os._exit(2)  # the main thread is in native code

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _what_is_missing(address: _Address | None, process_id: int | None) -> str:
    """Whether process 0 or another one has not come, as far as can be seen from here."""
    if address is None:
        return "not all of them have come."
    try:
        socket.create_connection(address, timeout=_PROBE_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        if process_id == 0:
            return f"process 0 does not reach itself at {address} ({reason})."
        return f"process 0 does not answer at {address} ({reason})."
    if process_id == 0:
        return f"not all of them have come to {address}."
    return f"process 0 answers at {address}, but not all of the others have come."


def refuse_unjoined_process(environment: Mapping[str, str] = os.environ) -> None:
    """Raises RunError on one of several hosts whose run does not join the others."""
    workers = environment.get("TPU_WORKER_HOSTNAMES", "")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    # Off a TPU, libtpu may leave a sentence of warning where the names should be.
    several = "," in workers and " " not in workers.strip()
    if several:
        reason = f"TPU_WORKER_HOSTNAMES names {workers.count(',') + 1} hosts"
    elif tasks.isdecimal() and int(tasks) > 1:
        reason = f"SLURM_STEP_NUM_TASKS={tasks}"
    else:
        return
    raise RunError(
        f"this is one of several processes ({reason}), each of which would train alone: add "
        "--distributed, or start a single one."
    )
