"""From a config to what runs: what is said of the prompts, and of the sampler."""

from __future__ import annotations

import pytest

from pec_jax.config.schema import from_config_dict
from pec_jax.flow.sampler import FlowSampler
from pec_jax.flow.schedule import sd3_sigmas
from pec_jax.training.build import load_prompt_sets
from pec_jax.training.parts import make_objective


def test_negative_prompts_in_training_are_said_to_be_unused(tmp_path, small_config, caplog):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a star", "negative_prompt": "red"}\n{"prompt": "a circle"}\n')
    small_config.prompts.train = str(path)
    with caplog.at_level("WARNING"):
        sets = load_prompt_sets(from_config_dict(small_config))
    assert [p.text for p in sets["train"]] == ["a star", "a circle"]
    assert [r.message for r in caplog.records] == [
        "1 of 2 prompts of config.prompts.train have a negative_prompt, which is not used: "
        "guidance steers away from the empty prompt here."
    ]


def test_half_a_character_in_a_sample_prompt(small_config):
    small_config.prompts.samples = ("a star", "a \ud83d circle")
    with pytest.raises(ValueError, match="one half of a character"):
        load_prompt_sets(from_config_dict(small_config))


@pytest.mark.parametrize(
    ("objective", "kernel", "warns"),
    [("grpo", "cps", True), ("grpo", "flow_sde", False), ("grpo_guard", "cps", False)],
)
def test_a_step_that_drowns_the_others_is_named(small_config, caplog, objective, kernel, warns):
    small_config.objective.name = objective
    sampler = FlowSampler(sd3_sigmas(6), kernel, 0.7, (True,) * 5 + (False,))
    with caplog.at_level("WARNING"):
        make_objective(from_config_dict(small_config)).check(sampler)
    assert bool(caplog.records) == warns
    if warns:
        assert "answers 147 times as much" in caplog.text
        assert "log_density=squared_error" in caplog.text
