"""What a run directory holds: its config, and what its newest checkpoint has learned."""

from __future__ import annotations

from pathlib import Path

from pec_jax.config import Config, ConfigError, from_config_dict
from pec_jax.errors import RunError
from pec_jax.families.base import Pipeline
from pec_jax.rl.train_step import initial_state
from pec_jax.training import build
from pec_jax.training.checkpoint import Checkpointer
from pec_jax.types import PyTree
from pec_jax.weights.tensors import read_json


def run_config(directory: Path) -> Config:
    """The config that a run was started with.

    Args:
      directory: the run's --workdir.

    Raises:
      RunError: not a run directory, or one of another version of this program.
      WeightsError: its config.json cannot be read.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise RunError(f"{directory} is not a run directory: it has no config.json.")
    try:
        return from_config_dict(read_json(path))
    except ConfigError as error:
        raise RunError(f"{path} is not the config of a run of this version: {error}") from None


def learned_params(directory: Path, config: Config, pipeline: Pipeline, *, use_ema: bool) -> PyTree:
    """The trainable parameters as the newest intact checkpoint has them.

    Args:
      directory: the run's --workdir.
      config: from `run_config`.
      pipeline: the model that was trained; shapes come from it, never from the checkpoint.
      use_ema: the averaged parameters instead of the last ones.

    Returns:
      A LoRA tree, or the whole transformer's parameters, as `config.trainable.mode` says.

    Raises:
      RunError: there is no checkpoint yet.
      CheckpointError: the checkpoints are damaged.
    """
    checkpoints, state = directory / "checkpoints", None
    # Opening a directory of checkpoints creates it and starts threads: only where there is one.
    if any(path.name.isdigit() for path in checkpoints.glob("*")):
        params = build.trainable_params(config, pipeline.transformer_variables["params"])
        objective = build.make_objective(config)
        constraints = build.make_constraints(config, objective)
        expected = initial_state(params, build.make_optimizer(config), objective, constraints)
        checkpointer = Checkpointer(checkpoints, keep=None)
        try:
            state = checkpointer.restore(expected)
        finally:
            checkpointer.close()
    if state is None:
        raise RunError(f"{directory} holds no checkpoint yet.")
    return state.ema if use_ema else state.params
