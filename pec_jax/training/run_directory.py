"""A run directory: where its files lie, and who may start in it.

A start goes through three steps, so that one that is refused or fails changes nothing:
`start` reads, and takes the hold; then models are loaded and the checkpoint is restored;
`commit` writes. In a new directory, a start that ends before `commit` leaves no directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import types
from typing import Any

from absl import logging
from etils import epath

from pec_jax import io
from pec_jax.config import Config, to_dict
from pec_jax.config.changes import alters_evaluation, binding, since
from pec_jax.errors import FileError, RunError
from pec_jax.training import base_evaluation
from pec_jax.training.hold import Hold, new_directory
from pec_jax.training.learned import CHECKPOINTS, CONFIG_FILE


class RunDirectory:
    """The files of a run, and the protocol of starting in their directory."""

    def __init__(self, name: str | os.PathLike[str]):
        """`name` is a --workdir: a local path, or gs://BUCKET/PATH."""
        self.path = io.path(name)
        if not io.is_remote(self.path):
            self.path = self.path.absolute()
        self.config_file = self.path / CONFIG_FILE
        self.metrics_file = self.path / "metrics.jsonl"
        self.evaluation_file = self.path / "eval.json"
        self.checkpoints = self.path / CHECKPOINTS
        self.samples = self.path / "samples"
        self._exit = contextlib.ExitStack()
        self._hold: Hold | None = None
        self._committed = False

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: Any, error: Any, trace: types.TracebackType | None) -> None:
        self._exit.close()

    def start(self, config: Config, *, allow_config_change: bool = False) -> None:
        """Checks that a run of this config may start here, and holds the directory from then on.

        Raises:
          RunError: the directory is a file, belongs to a run of another config, is in use, or
            cannot be written; the message says what to do.
        """
        self.check(config, allow_config_change=allow_config_change)
        if io.is_remote(self.path):
            _check_cloud_library(self.path)
        try:
            self._exit.enter_context(new_directory(self.path))
            hold = Hold(self.path)
            hold.take()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise RunError(
                f"--workdir={self.path} cannot be written: {error.strerror or error}. Choose "
                "another directory."
            ) from error
        self._hold = hold
        self._exit.callback(lambda: hold.release(restore=not self._committed))
        # What another process has done between the check and the hold.
        self.check(config, allow_config_change=allow_config_change)

    def check(self, config: Config, *, allow_config_change: bool = False) -> None:
        """Raises RunError unless this is a new directory or one of a run of `config`."""
        places = (self.path,) if io.is_remote(self.path) else (self.path, *self.path.parents)
        for place in places:
            if place.exists() and not place.is_dir():
                raise RunError(
                    f"--workdir={self.path}: {place} is a file. Give the name of a directory."
                )
        changes = self.changes(config)
        if (fields := binding(changes)) and not allow_config_change:
            raise RunError(
                f"{self.path} was made with another config:\n  "
                + "\n  ".join(changes[field] for field in fields)
                + "\nWhat it has learned depends on that. Choose another --workdir, or pass "
                "--allow_config_change to resume with the new one."
            )

    def changes(self, config: Config) -> dict[str, str]:
        """Dotted field -> a line, where `config` differs from that of the directory's run.

        Raises:
          RunError: the directory's config.json cannot be read.
        """
        if not self.config_file.exists():
            return {}
        try:
            return since(io.read_json(self.config_file), config)
        except FileError as error:
            raise RunError(f"{error}. Choose a new --workdir.") from None

    def commit(self, config: Config) -> None:
        """Makes this the directory of a run of `config`; from here on, files may be written."""
        self.check_held()
        changes = self.changes(config)
        if changes:
            for line in changes.values():
                logging.info("Resuming with %s.", line)
            self._set_results_aside(alters_evaluation(changes))
        if changes or not self.config_file.exists():
            io.write_json(self.config_file, to_dict(config))
        self._committed = True

    def _set_results_aside(self, base_too: bool) -> None:
        """Keeps what the final evaluation said under another name, for another will be made."""
        if self.evaluation_file.exists():
            step = io.read_json(self.evaluation_file).get("iterations", 0)
            kept = self.path / f"eval_step_{int(step):06d}.json"
            io.write_bytes(kept, self.evaluation_file.read_bytes())
            self.evaluation_file.unlink()
        if base_too:
            base_evaluation.remove(self.path)

    def check_held(self) -> None:
        """Raises RunError if the directory is gone, or another process has taken it."""
        if self._hold is not None:
            self._hold.check()


def _check_cloud_library(path: epath.Path) -> None:
    """Tells now what orbax would find out when it deletes the first old checkpoint."""
    try:
        from google.cloud import storage  # noqa: F401
    except ImportError:
        raise RunError(
            f"--workdir={path} needs google-cloud-storage: pip install 'pec_jax[gcs]'."
        ) from None
