"""The mesh: its sizes, what lies where, and that every shape of 8 devices computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pec_jax.config import ConfigError
from pec_jax.config.schema import MeshConfig, from_config_dict
from pec_jax.distributed import mesh as sharding
from tests.conftest import EXHAUSTIVE

RULES = [("batch", ("data", "fsdp")), ("embed", ("fsdp",)), ("mlp", ("tensor",))]
SIZES = {"data": 2, "fsdp": 4, "tensor": 2}
POWERS = (8, 4, 2, 1)
# One device; each axis alone, and all three. With EXHAUSTIVE=1 every shape of 8 devices.
SHAPES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
if EXHAUSTIVE:
    SHAPES[1:] = [(d, f, 8 // (d * f)) for d in POWERS for f in POWERS if d * f <= 8]
RANK = 4  # of the LoRA in mesh_program.py


def sizes(data, fsdp, tensor, *, groups, devices):
    return sharding._mesh_sizes(MeshConfig(data, fsdp, tensor, {}), groups, devices)


def test_what_is_left_goes_to_the_free_axis_as_far_as_the_groups_divide():
    assert sizes(-1, 1, 1, groups=6, devices=8) == (6, 1, 1)
    assert sizes(-1, 1, 1, groups=6, devices=1) == (1, 1, 1)
    assert sizes(-1, 16, 1, groups=48, devices=16) == (1, 16, 1)
    assert sizes(-1, 16, 1, groups=192, devices=64) == (4, 16, 1)
    assert sizes(1, -1, 2, groups=48, devices=16) == (1, 8, 2)
    assert sizes(2, 2, -1, groups=4, devices=16) == (2, 2, 4)


@pytest.mark.parametrize(
    "mesh, words",
    [
        ((-1, -1, 1), "only one of data, fsdp"),
        ((4, 4, 1), "needs 16 devices"),
        ((8, 1, 1), "does not divide over .* = 8 devices"),
    ],
)
def test_meshes_that_cannot_be_are_refused(mesh, words):
    with pytest.raises(ConfigError, match=words):
        sizes(*mesh, groups=6, devices=8)


def test_the_config_names_axes_that_exist(small_config):
    small_config.mesh.rules.embed = ("fdsp",)
    with pytest.raises(ConfigError, match=r"config.mesh.rules.embed.*Did you mean 'fsdp'"):
        from_config_dict(small_config)


@pytest.mark.parametrize(
    "names, shape, spec",
    [
        (("batch", "tokens", "embed"), (16, 5, 64), (("data", "fsdp"), None, None)),
        (("batch", None), (6, 3), ("data", None)),  # 6 divides by 2, but not by 8
        (("embed", "mlp"), (64, 6), ("fsdp", "tensor")),
        (("embed", "mlp"), (6, 5), (None, None)),
        ((None, "other"), (8, 8), (None, None)),
    ],
)
def test_where_an_array_is_split(names, shape, spec):
    found = sharding.partition(names, shape, RULES, SIZES)
    assert found == PartitionSpec(*spec)


def test_one_device_needs_no_constraint(small_config):
    config = from_config_dict(small_config)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    x = np.ones((2, 3), np.float32)
    with sharding.active(mesh, config):
        assert sharding.constrain(x, "batch", None) is x
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.local_groups(mesh, 6) == slice(0, 6)


def test_the_platform_is_that_of_the_devices_that_the_program_is_for(small_config):
    assert sharding.platform() == jax.default_backend()
    mesh = sharding.make_mesh(from_config_dict(small_config), jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert sharding.platform() == jax.devices()[0].platform
    chip = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    pod = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(pod):
        assert sharding.platform() == "tpu"


@pytest.fixture(scope="module")
def iterations():
    """Mesh shape -> what one iteration on it gave, in a process with 8 devices."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    program = Path(__file__).with_name("mesh_program.py")
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(SHAPES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(SHAPES, json.loads(done.stdout)))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_every_mesh_computes_what_one_device_does(iterations, shape):
    one, many = iterations[SHAPES[0]], iterations[shape]
    for name, value in one["metrics"].items():
        if name != "policy/logp_drift":  # rounding itself, which is another's on every mesh
            # A pixel on the edge of two 8-bit levels may fall to either side; seen: 1.1e-5.
            assert many["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-4), name
    for name, values in one["params"].items():
        np.testing.assert_allclose(many["params"][name], values, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_what_lies_where(iterations, shape):
    data, fsdp, tensor = shape
    found = iterations[shape]
    assert found["groups"] == 8 // (data * fsdp)  # whole groups on every device
    for network, share in found["kernel_bytes"].items():  # the policy's, the encoder's
        assert share == pytest.approx(1 / (fsdp * tensor)), network
    assert found["frozen_bytes_ahead"] == found["frozen_bytes"]
    if RANK % fsdp == 0:  # else it cannot be split
        assert found["state_bytes"] <= 1 / fsdp
    assert found["as_asked"]
    assert found["donated"] and found["reused"] > 0.99


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_the_devices_share_the_work(iterations, shape):
    """Activations are split as annotated: no device computes much more than its share.

    What `tensor` does not split (the VAE, norms, four heads over eight devices) each device of that
    axis computes again.
    """
    tensor = shape[2]
    share = iterations[shape]["flops"] / iterations[SHAPES[0]]["flops"]
    assert 0.9 <= share * 8 <= (1.1 if tensor == 1 else 1.1 * tensor)
