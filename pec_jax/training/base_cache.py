"""Evaluations of models before training, kept in the user's cache directory for later runs.

A run that begins as an earlier one did, such as the next of a sweep, need not evaluate its base
model again. An evaluation is taken up again only if nothing that it depends on has changed: this
package's code, the config but for what training alone reads, the versions of JAX, the devices, and
every array that goes in, by its content.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from absl import logging
from etils import epath

import pec_jax
from pec_jax import io
from pec_jax.config import to_dict
from pec_jax.config.changes import OF_TRAINING
from pec_jax.config.registry import ENCODERS, REWARDS, Registry
from pec_jax.training import base_evaluation
from pec_jax.training.build import Experiment
from pec_jax.training.evaluator import Evaluation

MAX_BYTES = 2**30  # of arrays; what is larger takes longer to train than to evaluate
KEPT = 64  # evaluations, of about 5 MB each

_LIBRARIES = ("jax", "jaxlib", "flax", "numpy")


def place(experiment: Experiment) -> epath.Path | None:
    """Where the evaluation of the experiment's base model is kept.

    None where it is not: on several hosts, for large models, and where code takes part that is not
    this package's, as judges on the host and plugins do.
    """
    heldout = experiment.tables["heldout"]
    arrays = experiment.params, experiment.frozen, heldout.gather(np.arange(len(heldout)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    if jax.process_count() > 1 or size > MAX_BYTES or not _is_ours(experiment):
        return None
    digest = hashlib.sha256()
    config = {k: v for k, v in to_dict(experiment.config).items() if k not in OF_TRAINING}
    versions = [importlib.metadata.version(name) for name in _LIBRARIES]
    devices = [device.device_kind for device in jax.devices()]
    digest.update(json.dumps([config, versions, devices], sort_keys=True).encode())
    root = Path(pec_jax.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.read_bytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return epath.Path(io.cache_directory() / "base_evaluations" / digest.hexdigest()[:32])


def read(directory: epath.Path | None) -> Evaluation | None:
    """The evaluation kept there, if there is one."""
    found = None if directory is None else base_evaluation.read_intact(directory)
    if found is not None:
        logging.info("The base model has been evaluated before: %s", directory)
    return found


def write(directory: epath.Path | None, evaluation: Evaluation) -> None:
    """Keeps an evaluation, and the newest KEPT of all. A cache that cannot be written is none."""
    if directory is None:
        return
    try:
        base_evaluation.write(directory, evaluation)
        others = sorted(Path(directory.parent).iterdir(), key=lambda d: d.stat().st_mtime)
        for old in others[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        logging.warning("The base model's evaluation is not kept for later runs: %s", error)


def _is_ours(experiment: Experiment) -> bool:
    """Whether this package's code alone, and no host, judges the images."""
    judged = experiment.rewards.rewards
    on_host = any(reward.job is not None for reward in judged.values())
    return not on_host and _shipped(REWARDS, judged) and _shipped(ENCODERS, experiment.spaces)


def _shipped(registry: Registry, names: Iterable[str]) -> bool:
    return all(registry[name].origin.startswith(f"{pec_jax.__name__}.") for name in names)
