"""Copies of a run's metrics, grids and config for the programs that people watch runs with.

The run itself keeps `metrics.jsonl` and its files; what is here may fail without harm to it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from absl import logging
from etils import epath

from pec_jax import io
from pec_jax.config import ConfigError, unknown
from pec_jax.config.changes import flatten
from pec_jax.errors import is_disk_full


class Logger(Protocol):
    """What a program is told; made by `LOGGERS[name](run directory, config as a nested dict)`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of an iteration or an evaluation."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture [H, W, 3], uint8."""

    def close(self) -> None:
        """Nothing more will come."""


class TensorBoard:
    """Event files in the run directory, through clu."""

    def __init__(self, directory: epath.Path, config: Mapping[str, Any]):
        from clu import metric_writers  # imports tensorflow, which takes seconds

        self._writer = metric_writers.SummaryWriter(os.fspath(directory))
        self._writer.write_texts(0, {"config": f"```json\n{json.dumps(config, indent=2)}\n```"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.write_scalars(step, values)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._writer.write_images(step, {name: picture[None]})

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; WANDB_PROJECT and its other variables say where."""

    def __init__(self, directory: epath.Path, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pec_jax"),
            name=directory.name,
            id=_identity(directory, "wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            config=dict(config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; MLFLOW_TRACKING_URI and its other variables say where."""

    def __init__(self, directory: epath.Path, config: Mapping[str, Any]):
        import mlflow
        from mlflow.entities import Metric, Param

        self._client, self._metric = mlflow.MlflowClient(), Metric
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pec_jax")
        found = self._client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self._client.create_experiment(experiment)

        def new() -> str:
            run = self._client.create_run(where, run_name=directory.name)
            params = [Param(field, str(value)) for field, value in flatten(config).items()]
            for start in range(0, len(params), 100):  # the most that a server takes at once
                self._client.log_batch(run.info.run_id, params=params[start : start + 100])
            return str(run.info.run_id)

        self._run = _identity(directory, "mlflow", new)
        self._client.update_run(self._run, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._client.log_image(self._run, picture, key=name, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


LOGGERS: dict[str, Callable[[epath.Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
_ALWAYS = "jsonl"  # the run's own record


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for a logger that there is not, or whose package is not installed."""
    for name in names:
        if name not in (*LOGGERS, _ALWAYS):
            raise ConfigError("--log: " + unknown("logger", name, [*LOGGERS, _ALWAYS]))
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--log={name} needs {name}: pip install 'pec_jax[{name}]'.")


class Loggers:
    """Several, in a thread of their own: nobody waits for their imports and their servers.

    One that fails is reported once and told nothing more.
    """

    def __init__(self, names: Sequence[str], directory: epath.Path, config: Mapping[str, Any]):
        self._thread = ThreadPoolExecutor(1)
        self._directory, self._config = directory, config
        self._unopened = [name for name in names if name in LOGGERS]
        self._open: dict[str, Logger] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        self._tell(lambda logger: logger.scalars(step, values))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture [H, W, 3], uint8."""
        self._tell(lambda logger: logger.image(step, name, picture))

    def close(self) -> None:
        """Returns once all have been told everything."""
        self._tell(lambda logger: logger.close())
        self._thread.shutdown()

    def _tell(self, message: Callable[[Logger], None]) -> None:
        if self._unopened or self._open:
            self._thread.submit(self._in_thread, message)

    def _in_thread(self, message: Callable[[Logger], None]) -> None:
        for name in self._unopened:
            self._guard(name, lambda name=name: self._open_one(name))  # type: ignore[misc]
        self._unopened = []
        for name, logger in list(self._open.items()):
            self._guard(name, lambda logger=logger: message(logger))  # type: ignore[misc]

    def _open_one(self, name: str) -> None:
        self._open[name] = LOGGERS[name](self._directory, self._config)

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a server or its client does, the run goes on
            text = " ".join(str(error).split())[:300]
            reason = (
                "the disk is full" if is_disk_full(error) else f"{type(error).__name__}: {text}"
            )
            logging.warning("--log=%s stops here, the run does not: %s", name, reason)
            self._open.pop(name, None)


def _identity(directory: epath.Path, name: str, new: Callable[[], str]) -> str:
    """The run's identifier at a server, made once and kept in the run directory."""
    path = directory / f".{name}.json"
    if path.exists():
        return str(io.read_json(path)["id"])
    made = new()
    io.write_json(path, {"id": made})
    return made
