"""Checkpoints with orbax: asynchronous, bounded in number, verified when read.

A checkpoint holds the whole TrainState. Everything else that a resumed run needs follows
from it: the prompt cursor is the iteration number, and all randomness is folded from the seed
and that number. Beside the arrays lie a checksum of every leaf, so that a damaged newest
checkpoint is noticed and the one before it is taken, and every leaf's shape, so that a checkpoint
of another model is not mistaken for a damaged one. Reading changes nothing in the directory.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from pec_jax import io
from pec_jax.errors import RunError, SaveError, is_disk_full
from pec_jax.types import PyTree, TrainState

_LISTED = 3  # arrays that a message names


class CheckpointError(RunError):
    """Checkpoints exist, but none of them can be read."""


class OtherModelError(CheckpointError):
    """A checkpoint is whole, but holds other arrays than the run has.

    Attributes:
      difference: in words, what is only there or only here.
    """

    def __init__(self, message: str, difference: str):
        super().__init__(message)
        self.difference = difference


@contextlib.contextmanager
def told_when_unwritable(run: epath.Path, checkpoints: epath.Path) -> Iterator[None]:
    """Says of a disk that is full, or a place that cannot be written, which checkpoint is safe.

    Args:
      run: the directory that is written to.
      checkpoints: where they lie.

    Raises:
      SaveError: in the place of whatever that has led to.
    """
    try:
        yield
    except Exception as error:
        full = is_disk_full(error)
        if not full and not _concerns(error, checkpoints):
            raise
        # Orbax renames what it has written whole.
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        steps = [int(name) for name in names if name.isdecimal()]
        safe = f"Checkpoint {max(steps)} is safe" if steps else "No checkpoint was written yet"
        if full:
            what, remedy = f"the disk of {run} is full", "free space"
        else:
            reason = getattr(error, "strerror", None) or error
            what, remedy = f"{checkpoints} cannot be written ({reason})", "mend that"
        raise SaveError(f"{what}. {safe}: {remedy}, and the same command goes on.") from error


def _concerns(error: Exception, directory: epath.Path) -> bool:
    """Whether an error is about a file there."""
    name = getattr(error, "filename", None)
    return isinstance(name, str) and epath.Path(name).is_relative_to(directory)


class Restored(NamedTuple):
    """What a directory of checkpoints holds."""

    state: TrainState | None  # None if there is no checkpoint
    damaged: list[int]  # steps of newer checkpoints that cannot be read


class Checkpointer:
    """Saves and restores TrainStates under `directory`; the newest `keep` stay (None: all).

    The directory is neither made nor changed before the first `save`.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int | None):
        path = io.path(directory)
        self._directory = path if io.is_remote(path) else path.absolute()
        self._keep = keep
        self._damaged: list[int] = []
        self._opened: ocp.CheckpointManager | None = None

    def restore(self, expected: TrainState) -> TrainState | None:
        """The newest intact checkpoint, or None if there is none; see `restore_newest`."""
        state, self._damaged = restore_newest(self._directory, expected)
        return state

    def save(self, state: TrainState) -> None:
        """Starts writing `state`, unless its step is there; returns once it is on the host."""
        manager = self._manager()
        if int(state.step) in manager.all_steps():
            return
        host_state = jax.device_get(state) if jax.process_count() == 1 else state
        manager.save(
            int(host_state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(host_state),
                checksums=ocp.args.JsonSave(_checksums(host_state)),
                shapes=ocp.args.JsonSave(_shapes(host_state)),
            ),
            force=True,
        )

    def wait(self) -> None:
        """Blocks until everything saved so far is on disk; raises what went wrong there."""
        if self._opened is not None:
            self._opened.wait_until_finished()
            self._opened.check_for_errors()

    def close(self) -> None:
        """Finishes pending writes and releases the directory."""
        if self._opened is not None:
            self._opened.close()

    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, opened for writing; what an interrupted save left is removed."""
        if self._opened is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True
            )
            self._opened = ocp.CheckpointManager(self._directory, options=options)
            for step in self._damaged:
                self._opened.delete(step)  # so that it can be saved anew
        return self._opened


def restore_newest(directory: epath.Path, expected: TrainState) -> Restored:
    """Reads the newest intact checkpoint.

    Args:
      directory: of checkpoints; need not exist.
      expected: a TrainState of arrays; its tree, shapes, dtypes and shardings are what is
        restored, never what a file claims.

    Raises:
      CheckpointError: there are checkpoints but none is intact.
      OtherModelError: the newest one that can be read has other arrays than `expected`.
    """
    damaged: list[int] = []
    reasons = []
    if not directory.exists():
        return Restored(None, [])
    # Not `read_only`, of which orbax warns at every start; these options change nothing either.
    options = ocp.CheckpointManagerOptions(create=False, cleanup_tmp_directories=False)
    with ocp.CheckpointManager(directory, options=options) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                arguments = ocp.args.Composite(shapes=ocp.args.JsonRestore())
                stored = manager.restore(step, args=arguments).shapes
                if stored == _shapes(expected):
                    return Restored(_read(manager, step, expected), damaged)
            except Exception as error:  # whatever a damaged file provokes in the readers below us
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                logging.warning("Checkpoint %d is damaged, trying the one before: %s", step, reason)
                reasons.append(f"step {step}: {reason}")
                damaged.append(step)
                continue
            difference = _difference(stored, _shapes(expected))
            raise OtherModelError(
                f"checkpoint {step} in {directory} holds other arrays than this config trains: "
                f"{difference}. A change of the model or of what is trained in it needs a new "
                "run: choose another --workdir.",
                difference,
            )
    if reasons:
        raise CheckpointError(
            f"no checkpoint in {directory} can be read ({'; '.join(reasons)}). "
            "Restore the directory from a backup, or start in a new --workdir."
        )
    return Restored(None, [])


def _read(manager: ocp.CheckpointManager, step: int, expected: TrainState) -> TrainState:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, expected)
    restored = manager.restore(
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


def _shapes(tree: PyTree) -> dict[str, list[int]]:
    """Name -> shape of every leaf, as JSON has it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _difference(stored: dict[str, list[int]], expected: dict[str, list[int]]) -> str:
    """In words: which arrays are only there, only here, or of another shape."""
    reshaped = [n for n in sorted(stored.keys() & expected.keys()) if stored[n] != expected[n]]
    parts = []
    if reshaped:
        shown = [f"{n} {stored[n]} there, {expected[n]} now" for n in reshaped]
        parts.append(_listing("of other shapes", shown))
    for names, what in ((stored, "only stored"), (expected, "not stored")):
        other = expected if names is stored else stored
        if only := sorted(names.keys() - other.keys()):
            parts.append(_listing(what, only))
    return "; ".join(parts)


def _listing(what: str, names: list[str]) -> str:
    more = len(names) - _LISTED
    return f"{what}: " + ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _checksums(tree: PyTree) -> dict[str, int]:
    """CRC-32 of every leaf that this process holds whole; leaves spread over hosts are left out."""
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if not whole and not leaf.is_fully_replicated:
            continue
        sums[jax.tree_util.keystr(path)] = zlib.crc32(np.ascontiguousarray(leaf).tobytes())
    return sums
