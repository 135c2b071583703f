"""What loggers are told: TensorBoard, and the real clients of W&B and MLflow, offline."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from etils import epath

from pec_jax.config import ConfigError
from pec_jax.training import loggers
from pec_jax.training import trainer as train_lib
from tests.conftest import small_config_dict

CONFIG = {"seed": 3, "optimizer": {"learning_rate": 0.5}}
PICTURE = np.full((8, 12, 3), 200, np.uint8)


def tell(names, directory, step=1):
    told = loggers.Loggers(names, epath.Path(directory), CONFIG)
    told.scalars(step, {"reward/mean": 0.25 * step})
    told.image(step, "samples", PICTURE)
    told.close()


def test_tensorboard_has_numbers_pictures_and_the_config(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    tell(["tensorboard"], tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert set(events.Tags()["tensors"]) == {"reward/mean", "samples", "config"}
    (event,) = events.Tensors("reward/mean")
    assert (event.step, float(make_ndarray(event.tensor_proto))) == (1, 0.25)
    (text,) = events.Tensors("config")
    assert b'"learning_rate": 0.5' in make_ndarray(text.tensor_proto).item()


def test_mlflow_has_them_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.chdir(tmp_path)  # artifacts go to ./mlruns
    (tmp_path / "run").mkdir()
    tell(["mlflow"], tmp_path / "run")
    tell(["mlflow"], tmp_path / "run", step=2)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/store.db")
    (run,) = client.search_runs([client.get_experiment_by_name("pec_jax").experiment_id])
    assert run.data.params == {"seed": "3", "optimizer.learning_rate": "0.5"}
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5)]
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert any(
        file.path.endswith(".png") for file in client.list_artifacts(run.info.run_id, "images")
    )


def test_weights_and_biases_writes_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "run").mkdir()
    tell(["wandb"], tmp_path / "run")
    tell(["wandb"], tmp_path / "run", step=2)
    identity = json.loads((tmp_path / "run" / ".wandb.json").read_text())["id"]
    runs = [d for d in os.listdir(tmp_path / "wandb") if d.startswith("offline-run")]
    assert len(runs) == 2 and all(name.endswith(identity) for name in runs)  # synced as one
    records = b"".join(
        path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run*/run-*.wandb")
    )
    assert b"reward/mean" in records and b"learning_rate" in records and b"samples" in records


def test_one_that_fails_is_reported_once_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    told = []

    class Broken:
        def __init__(self, directory, config):
            pass

        def scalars(self, step, values):
            raise ConnectionError("no route to host")

    class Fine:
        def __init__(self, directory, config):
            pass

        def scalars(self, step, values):
            told.append(step)

        def close(self):
            told.append("closed")

    monkeypatch.setattr(loggers, "LOGGERS", {"wandb": Broken, "mlflow": Fine})
    warnings = []
    monkeypatch.setattr(loggers.logging, "warning", lambda text, *a: warnings.append(text % a))
    group = loggers.Loggers(["wandb", "mlflow"], epath.Path(tmp_path), CONFIG)
    group.scalars(1, {})
    group.scalars(2, {})
    group.close()
    assert told == [1, 2, "closed"]
    assert warnings == [
        "--log=wandb stops here, the run does not: ConnectionError: no route to host"
    ]


def test_names_are_checked_before_anything_else(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        loggers.check(["wandbb"])
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pec_jax\[mlflow\]'"):
        train_lib.train(small_config_dict(), tmp_path / "run", log=["jsonl", "mlflow"])
    assert not (tmp_path / "run").exists()


def test_a_run_tells_them_its_evaluations_too(monkeypatch, tmp_path):
    told, opened = [], []

    class Recorder:
        def __init__(self, directory, config):
            opened.append(config)

        def scalars(self, step, values):
            told.append((step, sorted({name.split("/")[0] for name in values})))

        def image(self, step, name, picture):
            told.append((step, picture.dtype))

        def close(self):
            told.append("closed")

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", Recorder)
    config = small_config_dict()
    config.num_iterations = 1
    train_lib.train(config, tmp_path / "run")
    assert opened[0]["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    steps = [entry[0] for entry in told[:-1]]
    assert steps == [0, 0, 1, 1, 1] and told[-1] == "closed"
    assert "quality" in told[0][1] and "reward" in told[2][1] and "quality" in told[4][1]
