"""Overrides on the command line: a field that does not exist is answered with those that do."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from pec_jax.config.errors import ConfigError
from pec_jax.config.overrides import check_overrides

CONFIG = ConfigDict(
    {
        "seed": 0,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0, "b1": 0.9},
        "sampler": {"num_steps": 10, "window": (0, 1)},
        "eval": {"use_ema": True, "num_steps": 40},
        "reward": {"evaluate": False, "weight": 0.0},
    }
)


@pytest.mark.parametrize(
    "argument",
    [
        "--config.seed=1",
        "-config.seed",
        "--config.optimizer.b1=0.5",
        "--noconfig.eval.use_ema",
        "--config.sampler={'num_steps': 3}",
        "--config.sampler.window=(0, 1)",
        "--config.optimizer",
        "--config.sampler.window[0]=1",
        "--config=shapes_pec",
        "--workdir=config.seeed",
        "config.seeed",
    ],
)
def test_what_exists_passes(argument):
    check_overrides(CONFIG, ["--plugin=x", argument])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "--config.optimizer.learning_rat=1",
            ["config.optimizer has no field 'learning_rat'", "config.optimizer.learning_rate?"],
        ),
        (
            "--config.optimizer.lr=1",
            ["Did you mean config.optimizer.learning_rate?", "Valid: b1, learning_rate, weight"],
        ),
        ("--config.optimizer.wd", ["Did you mean config.optimizer.weight_decay?"]),
        ("--config.learning_rate=1", ["Did you mean config.optimizer.learning_rate?"]),
        ("--config.optimiser.b1=1", ["Did you mean config.optimizer?", "eval, optimizer, reward"]),
        ("--config.windo=1", ["Did you mean config.sampler.window?"]),
        ("--noconfig.eval.use_emma", ["Did you mean config.eval.use_ema?"]),
        (
            "--config.optimizer=0.1",
            ["config.optimizer is a section", "--config.optimizer.b1=...", "weight_decay"],
        ),
        ("--config.reward=.5", ["--config.reward.weight=..."]),
        ("--config.seed.x=1", ["config.seed is a value, not a section", "'x'"]),
    ],
)
def test_what_does_not_is_answered(argument, words):
    with pytest.raises(ConfigError) as error:
        check_overrides(CONFIG, [argument])
    assert all(word in str(error.value) for word in words)


def test_nothing_near_is_not_guessed():
    with pytest.raises(ConfigError) as error:
        check_overrides(CONFIG, ["--config.sampler.zebra=1"])
    assert "Did you mean" not in str(error.value)
