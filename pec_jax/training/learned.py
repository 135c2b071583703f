"""What a run of ours or somebody's LoRA has learned, and a model with it in place."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path

from absl import logging
from etils import epath

from pec_jax import io
from pec_jax.config import Config, ConfigError, from_config_dict
from pec_jax.errors import RunError
from pec_jax.families.base import Pipeline
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.pipeline import load_pipeline
from pec_jax.families.registry import read_family
from pec_jax.models import lora
from pec_jax.rl.policy import bind
from pec_jax.rl.train_step import initial_state
from pec_jax.training import parts
from pec_jax.training.checkpoint import OtherModelError, restore_newest
from pec_jax.types import PyTree
from pec_jax.weights.hub import HUB_ID, model_directory
from pec_jax.weights.lora_reader import read_lora

CONFIG_FILE, CHECKPOINTS = "config.json", "checkpoints"  # of a run directory
LORA_FILES = ("*.safetensors", "*.json")  # what is fetched of a remote directory


class Learned(abc.ABC):
    """What has been learned for a model, found and checked as far as it can be without weights."""

    @abc.abstractmethod
    def variables(self, pipeline: Pipeline, *, use_ema: bool = True) -> PyTree:
        """The pipeline's transformer with it: {"params": ..., "lora": ..., ...}.

        Args:
          pipeline: the model it belongs to.
          use_ema: of a run, the averaged parameters instead of the last ones.

        Raises:
          RunError: a run of another model, or one without a checkpoint.
          CheckpointError: the run's checkpoints are damaged.
        """


@dataclasses.dataclass(frozen=True)
class LearnedRun(Learned):
    """By a run: its newest checkpoint."""

    directory: epath.Path
    config: Config

    def variables(self, pipeline: Pipeline, *, use_ema: bool = True) -> PyTree:
        """See the base class."""
        try:
            params = learned_params(self.directory, self.config, pipeline, use_ema=use_ema)
        except OtherModelError as error:
            raise RunError(
                f"{self.directory} is a run of {self.config.model.path}, which has other arrays "
                f"than this model: {error.difference}."
            ) from None
        return bind(self.config.trainable, params, pipeline.transformer_variables)

    def warn_of_another_transformer(self, name: str) -> None:
        """Says so where a LoRA is put on a transformer that the run did not train."""
        trained = self.config.model.transformer
        if trained != name and self.config.trainable.mode == "lora":
            logging.warning(
                "%s was trained on the transformer %s: --transformer=%s draws what it has learned "
                "to draw.",
                self.directory,
                trained or "of its pipeline",
                trained or "''",
            )


@dataclasses.dataclass(frozen=True)
class LearnedLora(Learned):
    """In a LoRA file."""

    adapter: lora.Adapter

    def variables(self, pipeline: Pipeline, *, use_ema: bool = True) -> PyTree:
        """See the base class; a file has no average."""
        return lora.attach(pipeline.transformer_variables, self.adapter)


def open_learned(name: str, root: Path, transformer: Path | None = None) -> Learned:
    """Finds what a name stands for and reads as much of it as needs no weights.

    Args:
      name: a run directory; a LoRA file, or a directory that holds one; local, on gs://, or
        `organisation/repository@revision` on the hub.
      root: directory of the pipeline that it is for.
      transformer: directory of the one in place of the pipeline's, if it has its own shapes.

    Raises:
      RunError: there is no such thing, or it is a run of another family.
      WeightsError: the LoRA cannot be read, or is one of another model.
    """
    source = _find(name)
    if _is_run(source):
        config = run_config(source)
        _check_family(source, config, root)
        return LearnedRun(source, config)
    skeleton = load_pipeline(root, text=False, weights=False, transformer=transformer)
    shapes = skeleton.transformer_variables
    return LearnedLora(read_lora(io.local_copy(source, LORA_FILES), shapes["params"]))


def run_config(directory: epath.Path) -> Config:
    """The config that a run was started with.

    Args:
      directory: the run's --workdir.

    Raises:
      RunError: not a run directory, or one of another version of this program.
      FileError: its config.json cannot be read.
    """
    path = directory / CONFIG_FILE
    if not path.exists():
        raise RunError(f"{directory} is not a run directory: it has no config.json.")
    try:
        return from_config_dict(io.read_json(path))
    except ConfigError as error:
        raise RunError(
            f"{path} cannot be read: {error} If it names what a plugin registers, give the plugin "
            "as in training, with --plugin; or the run is of another version of pec_jax."
        ) from None


def learned_params(
    directory: epath.Path, config: Config, pipeline: Pipeline, *, use_ema: bool
) -> PyTree:
    """The trainable parameters as the newest intact checkpoint has them; nothing is written.

    Args:
      directory: the run's --workdir.
      config: from `run_config`.
      pipeline: the model that was trained; shapes come from it, never from the checkpoint.
      use_ema: the averaged parameters instead of the last ones.

    Returns:
      A LoRA tree, or the whole transformer's parameters, as `config.trainable.mode` says.

    Raises:
      RunError: there is no checkpoint yet.
      CheckpointError: the checkpoints are damaged, or of another model.
    """
    params = parts.trainable_params(config, pipeline.transformer_variables["params"])
    objective = parts.make_objective(config)
    constraints = parts.make_constraints(config, objective)
    expected = initial_state(params, parts.make_optimizer(config), objective, constraints)
    place = directory if io.is_remote(directory) else directory.absolute()
    state = restore_newest(place / CHECKPOINTS, expected).state
    if state is None:
        raise RunError(f"{directory} holds no checkpoint yet.")
    return state.ema if use_ema else state.params


def _find(name: str) -> epath.Path:
    path = io.path(name)
    if path.exists():
        return path
    match = HUB_ID.fullmatch(name)
    if match is not None and match["revision"]:
        return epath.Path(model_directory(name))
    raise RunError(
        f"{name} does not exist; it must be a run directory, a LoRA file, a directory that holds "
        "one, or a repository on the hub with its revision: organisation/repository@COMMIT."
    )


def _is_run(source: epath.Path) -> bool:
    """Whether a directory is a run's; there are LoRAs beside a config.json of another kind."""
    config = source / CONFIG_FILE
    return config.is_file() and "trainable" in io.read_json(config)


def _check_family(source: epath.Path, config: Config, root: Path) -> None:
    """Raises RunError for a run of another family, where its model is still at hand."""
    name = config.model.path
    model = SHAPES_DIRECTORY if name == "shapes" else Path(name).expanduser()
    if not (model / "model_index.json").is_file():
        return
    theirs, ours = read_family(model), read_family(root)
    if theirs is not ours:
        raise RunError(
            f"{source} is a run of a {theirs.class_name} ({name}); what it has learned does not "
            f"fit a {ours.class_name} ({root})."
        )
