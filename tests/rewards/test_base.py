"""How a reward becomes known to configs, and what its definition brings along."""

from __future__ import annotations

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.config import ConfigError, from_config_dict
from pec_jax.data.prompts import Prompt
from pec_jax.rewards import Reward, RewardOptions, base, field, register


def test_the_rewards_that_come_with_the_package(registry):
    assert {"attributes", "clip", "pickscore"} <= set(registry)


@dataclasses.dataclass(frozen=True)
class RedOptions(RewardOptions):
    """One option more than every reward has."""

    gain: float = field("Factor.", 1.0, low=0.0)


def make_red(options, networks):
    """The mean of the red channel."""
    return Reward("red", lambda _, images, inputs: options.gain * images[..., 0].mean((-2, -1)))


def test_a_section_of_a_config_has_the_definitions_options(registry, small_config):
    register("red", RedOptions)(make_red)
    default = {"weight": 0.0, "evaluate": False, "max_failures": 0.25, "gain": 1.0}
    assert registry.default_sections()["red"] == default
    config = from_config_dict(small_config)  # from before it was known
    assert config.rewards["red"] == RedOptions()
    small_config.rewards = {**small_config.rewards.to_dict(), "red": {"gain": 3}}
    assert from_config_dict(small_config).rewards["red"] == RedOptions(gain=3.0)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"gian": 2.0}, r"config\.rewards\.red: unknown field 'gian'\. Did you mean 'gain'"),
        ({"gain": -1.0}, r"config\.rewards\.red\.gain is -1\.0; it must be at least 0"),
        ({"gain": "much"}, r"config\.rewards\.red\.gain must be of type float"),
        ({"weight": float("nan")}, r"config\.rewards\.red\.weight is nan; .* finite"),
    ],
)
def test_a_wrong_option_is_named(registry, small_config, section, message):
    register("red", RedOptions)(make_red)
    small_config.rewards = {**small_config.rewards.to_dict(), "red": section}
    with pytest.raises(ConfigError, match=message):
        from_config_dict(small_config)


def test_an_unknown_reward_is_answered_with_those_there_are(small_config):
    small_config.rewards = {"pickscor": {"weight": 1.0}}
    message = r"unknown reward 'pickscor'\. Did you mean 'pickscore'\? Valid: aesthetic_laion"
    with pytest.raises(ConfigError, match=message):
        from_config_dict(small_config)


def test_a_name_is_taken_once(registry):
    assert register("red", RedOptions)(make_red) is make_red
    register("red", RedOptions)(make_red)  # a notebook cell that is run twice
    with pytest.raises(ValueError, match=r"'clip' is already taken by pec_jax\.rewards\.clip"):
        register("clip")(make_red)


def test_an_option_needs_a_default(registry):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Without(RewardOptions):
        gain: float = field("Factor.")

    with pytest.raises(ValueError, match="options of the reward 'red' lacks gain"):
        register("red", Without)(make_red)
    assert "red" not in registry


def test_the_documented_example_runs(registry, tmp_path, monkeypatch):
    example = base.__doc__.split("```python\n")[1].split("```")[0]
    (tmp_path / "warmth.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("warmth")
    warmth = registry["warmth"]
    reward = warmth.make(warmth.options(gain=2.0), None)
    inputs = reward.prepare({}, [Prompt("any")])
    warm = jnp.zeros((1, 2, 4, 4, 3)).at[0, 1, ..., 0].set(0.5)
    np.testing.assert_allclose(reward.score({}, warm, inputs), [[0.0, 1.0]])
