"""What --lora and trainable.init may name: runs, files, directories, the hub."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest

from pec_jax import io
from pec_jax.config import from_config_dict, to_dict
from pec_jax.errors import FileError, RunError
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.pipeline import load_pipeline
from pec_jax.families.tiny import write_pipeline
from pec_jax.models import lora
from pec_jax.rl.train_step import initial_state
from pec_jax.training import parts
from pec_jax.training.checkpoint import Checkpointer
from pec_jax.training.learned import LearnedLora, LearnedRun, open_learned
from pec_jax.weights.lora_files import write_lora
from pec_jax.weights.tensors import WeightsError
from tests import fake_bucket

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(SHAPES_DIRECTORY, text=False)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("tiny") / "flux", "flux")


@pytest.fixture(scope="module")
def adapter(pipeline):
    fresh = lora.init(pipeline.transformer_variables["params"], (r"to_q$",), 2, jax.random.key(0))
    return jax.tree.map(lambda a: a + 0.1, fresh)


@pytest.fixture
def file(tmp_path, adapter):
    return write_lora(tmp_path / "lora", adapter, 4.0)


@pytest.fixture
def run(tmp_path, small_config, pipeline):
    """A run directory with a checkpoint whose average differs from its last parameters."""
    config = from_config_dict(small_config)
    io.write_json(tmp_path / "run" / "config.json", to_dict(config))
    params = parts.trainable_params(config, pipeline.transformer_variables["params"])
    objective = parts.make_objective(config)
    constraints = parts.make_constraints(config, objective)
    state = initial_state(params, parts.make_optimizer(config), objective, constraints)
    state = state.replace(ema=jax.tree.map(lambda a: a + 1.0, state.params))
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", keep=1)
    checkpointer.save(state)
    checkpointer.wait()
    checkpointer.close()
    return tmp_path / "run", state


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_a_run(run, pipeline):
    directory, state = run
    learned = open_learned(str(directory), SHAPES_DIRECTORY)
    assert isinstance(learned, LearnedRun)
    trainable = learned.config.trainable
    for use_ema, params in ((True, state.ema), (False, state.params)):
        found = learned.variables(pipeline, use_ema=use_ema)
        same(found["lora"], lora.scaled(params, trainable.alpha, trainable.rank))
        assert found["params"] is pipeline.transformer_variables["params"]


def test_a_run_of_another_transformer_is_named(run, caplog):
    learned = open_learned(str(run[0]), SHAPES_DIRECTORY)
    learned.warn_of_another_transformer("")
    assert not caplog.text
    learned.warn_of_another_transformer("other.safetensors")
    assert "was trained on the transformer of its pipeline: --transformer=''" in caplog.text


@pytest.mark.parametrize("directory", [True, False])
def test_a_file_and_its_directory(file, pipeline, adapter, directory):
    learned = open_learned(str(file.parent if directory else file), SHAPES_DIRECTORY)
    assert isinstance(learned, LearnedLora)
    same(learned.variables(pipeline)["lora"], lora.scaled(adapter, 4.0, 2))


def test_a_lora_beside_a_config_of_another_kind(file, pipeline, adapter):
    io.write_json(file.parent / "config.json", {"model_type": "lora"})
    learned = open_learned(str(file.parent), SHAPES_DIRECTORY)
    same(learned.variables(pipeline)["lora"], lora.scaled(adapter, 4.0, 2))


class TestElsewhere:
    def test_a_bucket(self, tmp_path, monkeypatch, file, pipeline, adapter):
        monkeypatch.setenv(fake_bucket.ROOT, str(tmp_path / "buckets"))
        monkeypatch.setenv(io.CACHE_VARIABLE, str(tmp_path / "cache"))
        fake_bucket.install(monkeypatch)
        remote = io.path("gs://bucket/run/checkpoint-60/lora/x.safetensors")
        io.write_bytes(remote, file.read_bytes())
        learned = open_learned("gs://bucket/run/checkpoint-60", SHAPES_DIRECTORY)
        same(learned.variables(pipeline)["lora"], lora.scaled(adapter, 4.0, 2))

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch, file):
        """Stands in for the hub: one repository, which holds a LoRA."""
        asked = []

        def download(repo, revision, allow_patterns):
            asked.append((repo, revision, allow_patterns))
            shutil.copytree(file.parent, tmp_path / "snapshot", dirs_exist_ok=True)
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    def test_the_hub(self, hub, pipeline, adapter):
        learned = open_learned(f"org/lora@{COMMIT}", SHAPES_DIRECTORY)
        same(learned.variables(pipeline)["lora"], lora.scaled(adapter, 4.0, 2))
        assert {(repo, revision) for repo, revision, _ in hub} == {("org/lora", COMMIT)}
        assert "*.safetensors" in hub[-1][2]
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in hub[-1][2])

    @pytest.mark.parametrize("name", ["nowhere", "org/lora", "a b/c", f"a/b/c@{COMMIT}"])
    def test_neither_here_nor_there(self, hub, name):
        with pytest.raises(RunError, match=f"{name} does not exist; .*organisation/repository@"):
            open_learned(name, SHAPES_DIRECTORY)
        assert not hub

    def test_another_address(self):
        with pytest.raises(FileError, match="addresses of the kind s3"):
            open_learned("s3://bucket/lora", SHAPES_DIRECTORY)


class TestOfAnotherModel:
    def test_a_run_of_another_family(self, run, flux):
        """Where the run's model is at hand, before anything is loaded."""
        with pytest.raises(RunError) as error:
            open_learned(str(run[0]), flux)
        for word in (str(run[0]), "run of a StableDiffusion3Pipeline (shapes)", "FluxPipeline"):
            assert word in str(error.value)

    @pytest.mark.parametrize("path", ["org/sd3@main", "/no/such/model", "gs://bucket/sd3"])
    def test_a_run_of_a_model_that_is_not_here(self, run, flux, path):
        config = io.read_json(run[0] / "config.json")
        config["model"]["path"] = path
        io.write_json(run[0] / "config.json", config)
        learned = open_learned(str(run[0]), flux)
        with pytest.raises(RunError, match=f"run of {path}, which has other arrays .*only stored"):
            learned.variables(load_pipeline(flux, text=False))

    def test_a_file(self, file, flux):
        with pytest.raises(WeightsError, match="the LoRA belongs to another model"):
            open_learned(str(file), flux)


def test_a_run_without_a_checkpoint(run, pipeline):
    shutil.rmtree(run[0] / "checkpoints")
    with pytest.raises(RunError, match="holds no checkpoint yet"):
        open_learned(str(run[0]), SHAPES_DIRECTORY).variables(pipeline)


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "not valid JSON"), (json.dumps({"trainable": 1}), "of another version")],
)
def test_a_run_whose_config_is_broken(run, text, word):
    (run[0] / "config.json").write_text(text)
    with pytest.raises((RunError, FileError), match=f"config.json.*{word}"):
        open_learned(str(run[0]), SHAPES_DIRECTORY)
