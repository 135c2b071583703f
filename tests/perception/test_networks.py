"""Networks of rewards and encoders: loaded once, computed once, placed by logical axes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.config import from_config_dict
from pec_jax.config.registry import REWARDS
from pec_jax.distributed import mesh as sharding
from pec_jax.errors import FileError
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.models import layers
from pec_jax.perception.encoder import Encoder
from pec_jax.perception.networks import Networks
from pec_jax.rl.score import Space
from pec_jax.types import Frozen
from pec_jax.weights.tensors import write_tensors
from tests.conftest import on_eight_devices, small_config_dict

OWN = SHAPES_DIRECTORY / "encoders"
IMAGES = jax.random.uniform(jax.random.key(0), (2, 3, 64, 64, 3))
TEXT = jnp.ones((2, 64))


class Head(nn.Module):
    """A network of a user's own, as simple as an aesthetic score."""

    @nn.compact
    def __call__(self, x):
        x = layers.Dense(16, kernel_axes=("embed", "mlp"), name="hidden")(x)
        return layers.Dense(1, kernel_axes=("mlp", "embed"), name="out")(nn.relu(x))


EXAMPLE = jax.ShapeDtypeStruct((1, 8), jnp.float32)


def write_head(directory: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"hidden.weight": (16, 8), "hidden.bias": (16,), "out.weight": (1, 16)}
    shapes["out.bias"] = (1,)
    tensors = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    write_tensors(directory, tensors)
    return tensors


@pytest.fixture
def networks():
    return Networks(own=OWN, locate=Path)


def test_a_model_is_the_pipelines_own_or_another(networks, tmp_path):
    shutil.copytree(OWN / "dino", tmp_path / "other")
    own, other = networks.encoder("dino", ""), networks.encoder("dino", str(tmp_path / "other"))
    assert list(networks.variables) == [own.network, other.network]
    assert (own.network, other.network) == (str(OWN / "dino"), str(tmp_path / "other"))
    with pytest.raises(FileError, match="nothing"):
        networks.encoder("nothing", "")


def test_the_second_call_for_a_directory_loads_nothing(networks, monkeypatch):
    first = networks.encoder("pickscore", "")
    variables = networks.variables[first.network]
    monkeypatch.setattr("pec_jax.perception.loading.load_encoder", None)
    again = networks.encoder("clip", str(OWN / "pickscore"))
    assert again is first and networks.variables == {first.network: variables}


def flops(networks: Networks, encoder: Encoder, *, rewarded: bool, perceived: bool) -> float:
    """Of a score that looks at its images as the train step does."""
    reward = REWARDS["pickscore"].make(REWARDS["pickscore"].options(), networks)
    space = Space(encoder.network, encoder.image_features, 1.0)

    def score(variables, images):
        frozen = Frozen(transformer={}, vae={}, negative=None, networks=variables)
        rewards = rewarded and reward.score(variables[reward.network], images, TEXT)
        return rewards, perceived and space.of_images(frozen, images)

    compiled = jax.jit(score).lower(networks.variables, IMAGES).compile()
    return compiled.cost_analysis()["flops"]


def test_a_reward_and_an_encoder_of_one_directory_are_computed_once(networks, tmp_path):
    shared = networks.encoder("pickscore", "")
    both = flops(networks, shared, rewarded=True, perceived=True)
    alone = flops(networks, shared, rewarded=True, perceived=False)
    assert alone <= both < 1.01 * alone
    # The same weights in another directory are another network, and run beside it.
    shutil.copytree(OWN / "pickscore", tmp_path / "copy")
    copy = networks.encoder("pickscore", str(tmp_path / "copy"))
    assert flops(networks, copy, rewarded=True, perceived=True) > 1.9 * alone


def test_without_text_keeps_what_images_go_through(networks):
    encoder, dino = networks.encoder("clip", ""), networks.encoder("dino", "")
    kept = networks.without_text()
    all_of_it = networks.variables[encoder.network]
    dropped = set(all_of_it["params"]) - set(kept[encoder.network]["params"])
    assert dropped == {"text_model", "text_projection"}
    assert kept[dino.network]["params"].keys() == networks.variables[dino.network]["params"].keys()
    pixels = IMAGES[0]
    for function in (encoder.image_features, lambda variables, _: encoder.logit_scale(variables)):
        found, expected = (function(v, pixels) for v in (kept[encoder.network], all_of_it))
        np.testing.assert_array_equal(found, expected)


def test_without_weights_there_are_shapes(networks):
    planned = Networks(own=OWN, locate=Path, weights=False)
    for name in ("clip", "dino"):
        encoder, shapes = networks.encoder(name, ""), planned.encoder(name, "")
        assert shapes.dim == encoder.dim
        found = planned.variables[shapes.network]
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found))
        expected = jax.eval_shape(lambda v: v, networks.variables[encoder.network])
        assert found == expected
    key = planned.load(Path("nowhere"), Head(), EXAMPLE)
    assert planned.variables[key]["params"]["hidden"]["kernel"].shape == (8, 16)


def test_a_network_of_ones_own(networks, tmp_path):
    tensors = write_head(tmp_path)
    key = networks.load(tmp_path, Head(), EXAMPLE)
    assert networks.load(tmp_path, Head(), EXAMPLE) == key and list(networks.variables) == [key]
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    hidden = np.maximum(x @ tensors["hidden.weight"].T + tensors["hidden.bias"], 0)
    expected = hidden @ tensors["out.weight"].T + tensors["out.bias"]
    np.testing.assert_allclose(Head().apply(networks.variables[key], x), expected, atol=1e-5)
    assert networks.without_text()[key] is networks.variables[key]


class FinalNorm(nn.Module):
    """A part of a stored network."""

    @nn.compact
    def __call__(self, x):
        return layers.LayerNorm(name="layernorm")(x)


def test_a_part_of_an_encoder_has_variables_of_its_own(networks):
    tower = networks.encoder("dino", "")
    example, ignore = jax.ShapeDtypeStruct((1, 64), jnp.float32), (r"(?!layernorm\.).*",)
    key = networks.load(OWN / "dino", FinalNorm(), example, ignore=ignore)
    assert key != tower.network
    whole, part = (networks.variables[k]["params"] for k in (tower.network, key))
    assert list(part) == ["layernorm"] and len(whole) > 1
    jax.tree.map(np.testing.assert_array_equal, part["layernorm"], whole["layernorm"])


def placed_head():
    """Shape of one device's share of each array on a mesh of 2 x 2 x 2 devices."""
    config = small_config_dict()
    config.batch.groups = 4
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    config = from_config_dict(config)
    place = sharding.placement(sharding.make_mesh(config), config)
    networks = Networks(own=OWN, locate=Path, place=place)
    planned = Networks(own=OWN, locate=Path, place=place, weights=False)
    with tempfile.TemporaryDirectory() as directory:
        tensors = write_head(Path(directory))
        key = networks.load(Path(directory), Head(), EXAMPLE)
        planned.load(Path(directory), Head(), EXAMPLE)
    params, shapes = (n.variables[key]["params"] for n in (networks, planned))
    np.testing.assert_array_equal(params["hidden"]["kernel"], tensors["hidden.weight"].T)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s.sharding, params, shapes))
    return jax.tree.map(lambda a: list(a.addressable_shards[0].data.shape), params)


def test_a_network_of_ones_own_lies_where_its_logical_axes_say():
    """`embed` over fsdp and `mlp` over tensor, two devices each; vectors are whole."""
    found = on_eight_devices(placed_head)
    assert found["hidden"] == {"kernel": [4, 8], "bias": [16]}
    assert found["out"] == {"kernel": [8, 1], "bias": [1]}  # one output is not split
