"""Several processes that train together: who writes, agreeing, stopping.

Everything here is also right for one process, where it does next to nothing.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from pec_jax.errors import RunError
from pec_jax.types import PyTree


def is_primary() -> bool:
    """Whether this process is the one that writes files for all."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_primary(value: bool) -> bool:
    """What the first process says, on all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def on_primary(action: Callable[[], object]) -> None:
    """Runs `action` on the first process; if it fails there, it fails on every process.

    Raises:
      Exception: on the first process, that of `action`.
      RunError: on the others.
    """
    error: Exception | None = None
    if is_primary():
        try:
            action()
        except Exception as raised:
            error = raised
    if broadcast_from_primary(error is None):
        return
    raise error or RunError("process 0 could not go on; its own message says why.")


def fetch(tree: PyTree) -> PyTree:
    """Host copies of arrays, whole, on every process; all of them must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


class StopRequests:
    """Whether somebody asked this run to stop."""

    def __init__(self) -> None:
        self.requested = False  # of this process

    def agreed(self, iteration: int) -> bool:
        """Whether to stop before this iteration; the same answer on every process.

        All processes must ask, once an iteration. Of several, a SIGTERM to any one counts.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(iteration)
        return self.requested


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """SIGTERM and the first Ctrl-C ask to save and stop; a second Ctrl-C stops at once.

    Where several processes train together, JAX itself listens to SIGTERM and tells the others.
    """
    stop = StopRequests()

    def ask(number: int, frame: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True
        logging.info("Stopping after this iteration ...")

    numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    previous = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
