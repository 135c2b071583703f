"""Compiling ahead: the whole step from shapes alone, and what is said of it."""

from __future__ import annotations

import types

import jax
import pytest

from pec_jax.config import ConfigError, from_config_dict
from pec_jax.profiling import aot
from pec_jax.profiling.chips import CHIPS


def test_the_step_compiles_from_shapes_and_says_what_it_costs(small_config, experiment):
    config = from_config_dict(small_config)
    step = aot.compile_step(config, jax.devices()[:1])
    arguments, real = step.arguments, experiment.tables["train"].gather([0, 1])
    assert arguments.batch.conditioning.tokens.shape == real.conditioning.tokens.shape
    assert jax.tree.map(lambda a: a.shape, arguments.frozen.transformer) == jax.tree.map(
        lambda a: a.shape, experiment.frozen.transformer
    )
    found = aot.analyse(step, CHIPS["v5e"], 1)
    assert step.seconds > 0 and found["fits"] and found["collectives"] == {}
    assert found["parameters"]["trainable"] == sum(
        a.size for a in jax.tree.leaves(experiment.params)
    )
    sizes = found["bytes_per_chip"]
    assert sizes["peak"] >= sizes["arguments"] > 4 * found["parameters"]["total"]
    assert found["flops"]["analytic"] > 1e9
    assert found["roofline"]["seconds"] > 0


def test_chips_that_the_groups_leave_out_are_an_answer(small_config):
    small_config.mesh.update({"data": 1, "fsdp": 1})
    with pytest.raises(ConfigError, match=r"1 of 2 chips.*config.batch.groups"):
        aot.compile_step(from_config_dict(small_config), [*jax.devices()[:1]] * 2)


def test_an_unknown_model_is_answered_with_the_known_ones(small_config):
    small_config.model.path = "models/nothing"
    with pytest.raises(ConfigError, match=r"models/nothing: neither .* sd3.5-medium"):
        aot.compile_step(from_config_dict(small_config), jax.devices()[:1])


def test_an_unknown_chip_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'v5' ?.*v5e, v5p"):
        aot.topology_devices("v5:4x4")


@pytest.mark.parametrize(
    ("name", "bounds"),
    [("v5e:1x1", [1, 1, 1]), ("v5p:1x1x1", [1, 1, 1]), ("v5e:4x4", None), ("v5e:1x16", None)],
)
def test_a_single_chip_is_a_host_of_its_own(monkeypatch, name, bounds):
    """libtpu divides by four chips to a host and fails; seen with libtpu 0.0.42."""
    asked = {}

    def described(topology, **options):
        asked.update(options, name=topology)
        return types.SimpleNamespace(devices=["chip"])

    monkeypatch.setattr(aot.topologies, "get_topology_desc", described)
    devices, _ = aot.topology_devices(name)
    assert devices == ["chip"] and asked["name"] == name
    assert asked.get("chips_per_host_bounds") == bounds
