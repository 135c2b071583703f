"""config.trainable.init: the model it starts at, what stays its reference, and what is refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from pec_jax import io
from pec_jax.config import ConfigError, from_config_dict, to_dict
from pec_jax.errors import RunError
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.pipeline import load_pipeline
from pec_jax.models import lora
from pec_jax.rl.train_step import initial_state
from pec_jax.training import parts, warm_start
from pec_jax.training import trainer as train_lib
from pec_jax.training.build import build
from pec_jax.training.checkpoint import Checkpointer
from pec_jax.weights.lora_files import write_lora
from pec_jax.weights.tensors import write_tensors

Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(SHAPES_DIRECTORY, text=False)


@pytest.fixture(scope="module")
def base(pipeline):
    return pipeline.transformer_variables["params"]


def adapter(params, config, **changes):
    """A LoRA as after a training."""
    trainable = {"targets": config.trainable.targets, "rank": config.trainable.rank} | changes
    fresh = lora.init(params, trainable["targets"], trainable["rank"], jax.random.key(1))
    return jax.tree.map(lambda a: a + 0.05, fresh)


def started(values, pipeline, init):
    """(config, initial parameters) of a run that starts from something."""
    values.trainable.init = str(init)
    config = from_config_dict(values)
    start = warm_start.open_start(config, SHAPES_DIRECTORY)
    return config, warm_start.initial_params(config, pipeline, start)


def same(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-6}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_without_it_a_run_starts_at_the_base_model(small_config, pipeline, base):
    config, params = started(small_config, pipeline, "")
    jax.tree.map(np.testing.assert_array_equal, params, parts.trainable_params(config, base))
    assert not any(leaf.any() for path, leaf in flatten_dict(params).items() if path[-1] == "b")


class TestLora:
    @pytest.mark.parametrize("alpha", [8.0, 2.0])
    def test_the_model_is_that_of_the_file_whatever_alpha(
        self, tmp_path, small_config, pipeline, base, alpha
    ):
        learned = adapter(base, from_config_dict(small_config))
        file = write_lora(tmp_path, learned, 8.0)
        small_config.trainable.alpha = alpha
        config, params = started(small_config, pipeline, file)
        rank = config.trainable.rank
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        same(lora.scaled(params, alpha, rank), lora.scaled(learned, 8.0, rank))
        if alpha == 8.0:  # its own: then the factors are, too
            same(params, learned)

    def test_of_a_run_the_average(self, tmp_path, small_config, pipeline, base):
        config = from_config_dict(small_config)
        state = save_run(tmp_path / "run", config, base)
        small_config.trainable.alpha = 2 * config.trainable.alpha
        _, params = started(small_config, pipeline, tmp_path / "run")
        halved = lora.scaled(state.ema, 0.5, 1)
        same(params, halved)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"rank": 2},
                ["has rank 2 in transformer_blocks.0.attn", "config.trainable.rank is 4"],
            ),
            ({"targets": (r"attn\.to_q$",)}, ["does not adapt", "attn.add_k_proj"]),
            ({"targets": (r"attn|ff\.net",)}, ["adapts .*do not match", "ff.net.0.proj"]),
        ],
    )
    def test_one_that_does_not_fit(self, tmp_path, small_config, pipeline, base, changes, words):
        file = write_lora(tmp_path, adapter(base, from_config_dict(small_config), **changes), 8.0)
        for word in (*words, rf"config\.trainable\.init={file}", r"config\.trainable\.mode=full"):
            with pytest.raises(ConfigError, match=word):
                started(small_config, pipeline, file)

    @pytest.mark.parametrize(
        ("field", "value", "word"),
        [("rank", 8, "has rank 4 in"), ("targets", (r"attn\.to_q$",), "adapts .*do not match")],
    )
    def test_a_run_that_does_not_fit(self, tmp_path, small_config, pipeline, field, value, word):
        """Its config is enough to tell; there is no checkpoint here."""
        io.write_json(tmp_path / "run" / "config.json", to_dict(from_config_dict(small_config)))
        setattr(small_config.trainable, field, value)
        with pytest.raises(ConfigError, match=word):
            started(small_config, pipeline, tmp_path / "run")

    def test_one_with_a_layer_of_a_run_left_out(self, tmp_path, small_config, pipeline, base):
        """What would fill up the run is zero on both sides, and could never learn."""
        file = write_lora(tmp_path / "whole", adapter(base, from_config_dict(small_config)), 4.0)
        tensors = {name: value for name, value in load_file(file).items() if Q not in name}
        partial = write_tensors(tmp_path, tensors, "partial")
        with pytest.raises(
            ConfigError, match=f"does not adapt {Q}, which config.trainable.targets"
        ):
            started(small_config, pipeline, partial)

    def test_more_than_a_product(self, tmp_path, small_config, pipeline, base):
        file = dora(tmp_path, base)
        with pytest.raises(ConfigError, match=r"biases or magnitudes \(DoRA\)"):
            started(small_config, pipeline, file)

    def test_a_run_of_all_weights(self, tmp_path, small_config, pipeline, base):
        small_config.trainable.mode = "full"
        io.write_json(
            tmp_path / "run" / "config.json", to_dict(from_config_dict(small_config))
        )  # no checkpoint is needed to tell
        small_config.trainable.mode = "lora"
        with pytest.raises(ConfigError, match="trained the whole transformer"):
            started(small_config, pipeline, tmp_path / "run")

    def test_a_scale_of_zero(self, tmp_path, small_config, pipeline, base):
        file = write_lora(tmp_path, adapter(base, from_config_dict(small_config)), 4.0)
        small_config.trainable.alpha = 0.0
        with pytest.raises(ConfigError, match=r"config\.trainable\.alpha is 0"):
            started(small_config, pipeline, file)

    def test_nothing(self, small_config, pipeline):
        with pytest.raises(RunError, match="/no/where does not exist"):
            started(small_config, pipeline, "/no/where")


def save_run(directory, config, base):
    """A run directory with one checkpoint, whose average differs from its last parameters."""
    io.write_json(directory / "config.json", to_dict(config))
    params = adapter(base, config) if config.trainable.mode == "lora" else base
    objective = parts.make_objective(config)
    constraints = parts.make_constraints(config, objective)
    state = initial_state(params, parts.make_optimizer(config), objective, constraints)
    state = state.replace(ema=jax.tree.map(lambda a: a * 1.5, state.params))
    checkpointer = Checkpointer(directory / "checkpoints", keep=1)
    checkpointer.save(state)
    checkpointer.wait()
    checkpointer.close()
    return state


def dora(directory, base):
    width = base["transformer_blocks.0:2"]["attn"]["to_q"]["kernel"].shape[-1]
    rng = np.random.default_rng(0)
    tensors = {
        f"transformer.{Q}.lora_A.weight": rng.normal(size=(4, width)).astype(np.float32),
        f"transformer.{Q}.lora_B.weight": rng.normal(size=(width, 4)).astype(np.float32),
        f"transformer.{Q}.lora_magnitude_vector": rng.uniform(1, 2, width).astype(np.float32),
    }
    return write_tensors(directory, tensors, "dora")


class TestFull:
    def test_a_lora_is_merged(self, tmp_path, small_config, pipeline, base):
        learned = adapter(base, from_config_dict(small_config), rank=3, targets=(r"to_q|proj_out",))
        file = write_lora(tmp_path, learned, 6.0)
        small_config.trainable.mode = "full"
        _, params = started(small_config, pipeline, file)
        same(params, lora.merge(base, lora.scaled(learned, 6.0, 3)), atol=1e-6)

    def test_so_is_dora(self, tmp_path, small_config, pipeline, base):
        small_config.trainable.mode = "full"
        file = dora(tmp_path, base)
        _, params = started(small_config, pipeline, file)
        kernel = np.asarray(params["transformer_blocks.0:2"]["attn"]["to_q"]["kernel"])
        magnitude = load_file(file)[f"transformer.{Q}.lora_magnitude_vector"]
        np.testing.assert_allclose(np.linalg.norm(kernel[0], axis=0), magnitude, rtol=1e-5)
        before = base["transformer_blocks.0:2"]["attn"]["to_q"]["kernel"]
        np.testing.assert_array_equal(kernel[1], before[1])

    def test_a_run_of_all_weights_is_taken_over(self, tmp_path, small_config, pipeline, base):
        small_config.trainable.mode = "full"
        state = save_run(tmp_path / "run", from_config_dict(small_config), base)
        _, params = started(small_config, pipeline, tmp_path / "run")
        same(params, state.ema)


class TestRun:
    @pytest.fixture
    def file(self, tmp_path, small_config, base):
        return write_lora(tmp_path / "lora", adapter(base, from_config_dict(small_config)), 4.0)

    def test_the_reference_stays_the_base_model(self, small_config, file, experiment):
        small_config.trainable.init = str(file)
        made = build(from_config_dict(small_config))
        same(made.frozen.transformer, experiment.frozen.transformer)
        conditioning = made.tables["train"].gather(np.arange(2)).conditioning
        x = jax.random.normal(jax.random.key(0), (2, *made.program.drawing.policy.latent_shape))
        velocities = {}
        for name, e in (("started", made), ("plain", experiment)):
            actor = e.program.drawing.policy.before(e.frozen, conditioning)
            for params, what in ((None, "reference"), (e.params, "policy")):
                velocities[name, what] = np.asarray(actor.velocity(params)(x, jnp.float32(0.5)))
        plain = velocities["plain", "policy"]
        np.testing.assert_array_equal(velocities["started", "reference"], plain)
        np.testing.assert_array_equal(velocities["plain", "reference"], plain)
        assert np.abs(velocities["started", "policy"] - plain).max() > 0.01 * plain.std()

    def test_the_base_of_its_evaluations_is_where_it_starts(self, tmp_path, small_config, file):
        small_config.num_iterations = 0
        plain = train_lib.train(small_config, tmp_path / "plain")
        small_config.trainable.init = str(file)
        result = train_lib.train(small_config, tmp_path / "run")
        name = "quality/pickscore"
        assert result[name] == pytest.approx(result[f"base/{name}"], abs=1e-6)
        assert result[name] != pytest.approx(plain[name], abs=1e-4)
        stored = json.loads((tmp_path / "run" / "config.json").read_text())
        assert stored["trainable"]["init"] == str(file)

    def test_it_learns_on_and_resumes(self, tmp_path, small_config, file, pipeline):
        small_config.num_iterations = 1
        small_config.constraints.kl.weight = 0.1
        _, first = started(small_config, pipeline, file)
        train_lib.train(small_config, tmp_path / "run")
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        step = next(line for line in map(json.loads, lines) if "policy/kl" in line)
        assert step["policy/kl"] > 0  # from the reference, which is not where it starts
        small_config.num_iterations = 2
        result = train_lib.train(small_config, tmp_path / "run")
        assert result["iterations"] == 2
        _, then = started(small_config, pipeline, tmp_path / "run")
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, then)
        assert 0 < max(jax.tree.leaves(moved)) < 0.1
