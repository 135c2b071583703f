"""Configs: what is accepted, and what a person is told when it is not."""

from __future__ import annotations

import importlib
import math

import pytest

from pec_jax import config as config_lib
from pec_jax.config import ConfigError, from_config_dict
from pec_jax.config.changes import since

CONFIGS = (
    "base",
    "eval_paper",
    "flux_grpo",
    "flux_pec",
    "flux_pec_fast",
    "flux_pec_geneval",
    "flux_pec_ocr",
    "sd3_grpo",
    "sd3_grpo_geneval",
    "sd3_grpo_ocr",
    "sd3_pec",
    "sd3_pec_fast",
    "sd3_pec_geneval",
    "sd3_pec_ocr",
    "shapes_grpo",
    "shapes_grpo_kl",
    "shapes_pec",
    "shapes_study",
)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_file_is_valid_documented_and_locked(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert from_config_dict(config).num_iterations > 0 or name == "eval_paper"
    assert "Command" in module.__doc__
    with pytest.raises(AttributeError):
        config.no_such_field = 1


def test_a_config_survives_the_way_through_json(small_config):
    import json

    config = from_config_dict(small_config)
    stored = json.loads(json.dumps(config_lib.to_dict(config)))
    assert from_config_dict(stored) == config
    assert config_lib.differences(stored, config_lib.to_dict(config)) == {}


def test_differences_name_the_field_and_both_values(small_config):
    old = config_lib.to_dict(from_config_dict(small_config))
    small_config.optimizer.learning_rate = 0.5
    new = config_lib.to_dict(from_config_dict(small_config))
    assert config_lib.differences(old, new) == {
        "optimizer.learning_rate": "config.optimizer.learning_rate: 0.003 there, 0.5 now"
    }


def test_dataclasses_are_frozen(small_config):
    config = from_config_dict(small_config)
    with pytest.raises(AttributeError):
        config.seed = 3


# path of the field, bad value, words that the message must contain
BAD_VALUES = [
    ("batch.group_size", 1, ["config.batch.group_size", "at least 2"]),
    ("batch.rollout_images", 3, ["config.batch.rollout_images", "divide"]),
    ("batch.decode_images", 3, ["config.batch.decode_images", "divide"]),
    ("batch.update_images", 3, ["config.batch.update_images", "divide"]),
    ("updates.minibatches", 3, ["config.updates.minibatches", "multiple of 3"]),
    ("sampler.num_steps", 1, ["config.sampler.num_steps", "at least 2"]),
    ("sampler.window", (2, 9), ["config.sampler.window", "num_steps (3)"]),
    ("sampler.window", (1,), ["config.sampler.window", "(start, stop)"]),
    ("sampler.window_moves", "forward", ["config.sampler.window_moves", "give the window"]),
    ("sampler.window_iterations", 0, ["config.sampler.window_iterations", "at least 1"]),
    ("model.dtype", "float16", ["config.model.dtype", "bfloat16", "float32"]),
    ("trainable.mode", "loraa", ["'loraa'", "Did you mean 'lora'", "full"]),
    ("constraints.pec.unit", "std", ["config.constraints.pec.unit", "raw", "reward_std"]),
    ("constraints.pec.weight", -1.0, ["config.constraints.pec.weight", "at least 0"]),
    ("constraints.pec.weight", math.nan, ["config.constraints.pec.weight", "a finite number"]),
    ("trainable.targets", ("attn", "("), ["config.trainable.targets: '('", "regular expression"]),
    ("constraints.pecc", {"weight": 1.0}, ["config.constraints", "Did you mean 'pec'"]),
    ("constraints.pec.wait", 1.0, ["config.constraints.pec", "Did you mean 'weight'"]),
    ("objective.name", "grpoo", ["config.objective.name", "Did you mean 'grpo'", "nft"]),
    ("objective.grpo.clip_low", 2.0, ["config.objective.grpo.clip_low", "at most 1"]),
    ("optimizer.learning_rate", math.inf, ["config.optimizer.learning_rate", "is inf"]),
    ("seed", -1, ["config.seed", "at least 0"]),
    ("seed", 2**64 - 1, ["config.seed", "at most 4294967295"]),
    ("sampler.kernel", "sde", ["config.sampler.kernel", "flow_sde", "cps"]),
    ("optimizer.learning_rate", "fast", ["config.optimizer.learning_rate", "type float"]),
    ("num_iterations", 1.5, ["config.num_iterations", "type int"]),
    ("rewards.pickscore.weight", 0.0, ["config.rewards", "weight other than 0"]),
    ("rewards.pickscore.weight", "much", ["config.rewards.pickscore.weight", "type float"]),
    ("rewards.ocrr", {"weight": 1.0}, ["config.rewards", "unknown reward 'ocrr'"]),
    ("eval", 3, ["config.eval", "section"]),
    ("batch.decode_images", 10**400, ["config.batch.decode_images", "beyond 64 bits"]),
]


@pytest.mark.parametrize(("path", "value", "words"), BAD_VALUES)
def test_a_bad_value_is_answered_with_field_and_remedy(small_config, path, value, words):
    values = small_config.to_dict()
    *sections, field = path.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[field] = value
    with pytest.raises(ConfigError) as error:
        from_config_dict(values)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("sampler", {"window": (0, 2)}, r"window \(0, 2\) already ends .* = 2: begin earlier"),
        ("sampler", {"window": (0, 1), "kernel": "ode"}, "the kernel ode has no stochastic"),
        ("perception", {"at": "steps"}, "config.perception.at=final"),
    ],
)
def test_a_window_moves_where_it_can(small_config, section, fields, words):
    small_config.sampler.update({"window": (0, 1), "window_moves": "forward"})
    from_config_dict(small_config)
    small_config[section].update(fields)
    with pytest.raises(ConfigError, match=words):
        from_config_dict(small_config)


def test_k_of_the_knn_must_be_below_the_group_size(small_config):
    small_config.perception.update({"estimator": "knn", "k": 4})
    with pytest.raises(ConfigError, match="3 neighbours"):
        from_config_dict(small_config)


def test_an_unknown_field_is_answered_with_the_nearest(small_config):
    values = small_config.to_dict()
    values["sampler"]["num_stepz"] = 4
    with pytest.raises(ConfigError, match=r"'num_stepz'. Did you mean 'num_steps'"):
        from_config_dict(values)


def test_a_missing_field_is_named(small_config):
    values = small_config.to_dict()
    del values["sampler"]["guidance"]
    with pytest.raises(ConfigError, match=r"config\.sampler lacks guidance"):
        from_config_dict(values)


def test_a_run_from_before_a_field_is_one_that_leaves_it_alone(small_config):
    now = from_config_dict(small_config)
    stored = config_lib.to_dict(now)
    for section, field in (
        ("model", "transformer"),
        ("trainable", "init"),
        ("sampler", "window_moves"),
        ("sampler", "window_iterations"),
    ):
        del stored[section][field]
    assert from_config_dict(stored) == now
    assert not since(stored, now)


def test_a_definition_brings_its_section_with_defaults(small_config):
    values = small_config.to_dict()
    del values["constraints"]["kl"], values["rewards"]["clip"]
    config = from_config_dict(values)
    assert config.constraints["kl"].weight == 0 and not config.rewards["clip"].evaluate


def test_a_config_of_an_earlier_version_is_answered(small_config):
    values = small_config.to_dict() | {"constraint": {"name": "pec"}}
    with pytest.raises(ConfigError, match=r"earlier version.*config\.constraints\.NAME\.weight"):
        from_config_dict(values)


def test_every_field_has_a_help(small_config):
    from dataclasses import fields, is_dataclass

    def walk(section):
        for entry in fields(section):
            value = getattr(section, entry.name)
            if is_dataclass(value) and not hasattr(value, "sections"):
                walk(value)
            else:
                assert entry.metadata["help"].endswith("."), entry.name

    config = from_config_dict(small_config)
    walk(config)
    for sections in (
        config.constraints,
        config.rewards,
        config.encoders,
        config.objective.sections,
    ):
        for options in sections.values():
            walk(options)
