"""Checkpoints with orbax: asynchronous, bounded in number, verified when read.

A checkpoint holds the whole TrainState. Everything else that a resumed run needs follows
from it: the prompt cursor is the iteration number, and all randomness is folded from the seed
and that number. Beside the arrays lies a checksum of every leaf, so that a damaged newest
checkpoint is noticed and the one before it is taken.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from pec_jax.errors import RunError
from pec_jax.types import PyTree, TrainState


class CheckpointError(RunError):
    """Checkpoints exist, but none of them can be read."""


class Checkpointer:
    """Saves and restores TrainStates under `directory`; the newest `keep` stay (None: all)."""

    def __init__(self, directory: str | Path, keep: int | None):
        self._directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def save(self, state: TrainState) -> None:
        """Starts writing `state`, unless its step is there; returns once it is on the host."""
        if int(state.step) in self._manager.all_steps():
            return
        host_state = jax.device_get(state) if jax.process_count() == 1 else state
        self._manager.save(
            int(host_state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(host_state),
                checksums=ocp.args.JsonSave(_checksums(host_state)),
            ),
            force=True,
        )

    def restore(self, expected: TrainState) -> TrainState | None:
        """The newest intact checkpoint, or None if there is none at all.

        Args:
          expected: a TrainState of arrays; its tree, shapes, dtypes and shardings are what is
            restored, never what a file claims.

        Raises:
          CheckpointError: if there are checkpoints but none is intact.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        reasons = []
        for step in steps:
            try:
                state = self._restore_step(step, expected)
            except Exception as error:  # whatever a damaged file provokes in the readers below us
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                logging.warning("Checkpoint %d is damaged, trying the one before: %s", step, reason)
                reasons.append(f"step {step}: {reason}")
                continue
            for damaged in steps[: len(reasons)]:
                self._manager.delete(damaged)  # so that the step can be saved anew
            return state
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be read ({'; '.join(reasons)}). "
                "Restore the directory from a backup, or start in a new --workdir."
            )
        return None

    def _restore_step(self, step: int, expected: TrainState) -> TrainState:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, expected)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), checksums=ocp.args.JsonRestore()
            ),
        )
        found, stored = _checksums(restored.state), restored.checksums
        both = found.keys() & stored.keys()  # other hosts may have seen other leaves whole
        damaged = sorted(name for name in both if stored[name] != found[name])
        if damaged:
            raise ValueError(f"the stored bytes of {damaged[0]} do not match their checksum")
        return restored.state

    def wait(self) -> None:
        """Blocks until everything saved so far is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Finishes pending writes and releases the directory."""
        self._manager.close()


def _checksums(tree: PyTree) -> dict[str, int]:
    """CRC-32 of every leaf that this process holds whole; leaves spread over hosts are left out."""
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if not whole and not leaf.is_fully_replicated:
            continue
        sums[jax.tree_util.keystr(path)] = zlib.crc32(np.ascontiguousarray(leaf).tobytes())
    return sums
