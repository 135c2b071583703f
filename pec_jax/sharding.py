"""The device mesh and what lies where on it; no model code.

This version shards the groups of an iteration over the axis `data` and keeps parameters
replicated. Groups are never split, so group statistics need no collective.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pec_jax.config import Config, ConfigError
from pec_jax.types import PyTree

DATA_AXIS = "data"


def make_mesh(config: Config) -> Mesh:
    """A one-axis mesh over the first `config.mesh.data` devices (-1: all that divide the groups).

    Raises:
      ConfigError: if there are too few devices, or if the groups do not divide over them.
    """
    devices = jax.devices()
    wanted = config.mesh.data
    per_update = config.batch.groups // config.grpo.minibatches
    if wanted == -1:
        wanted = max(n for n in range(1, len(devices) + 1) if per_update % n == 0)
    if not 1 <= wanted <= len(devices):
        raise ConfigError(
            f"config.mesh.data is {config.mesh.data}, but there are {len(devices)} devices: "
            "take a number up to that, or -1 for as many as divide the groups."
        )
    if per_update % wanted:
        raise ConfigError(
            f"{per_update} groups of a mini-batch do not divide over config.mesh.data={wanted} "
            "devices: groups are never split."
        )
    return Mesh(np.asarray(devices[:wanted]), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_groups(mesh: Mesh) -> NamedSharding:
    """The leading axis (groups P, or images grouped as P * K) is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places a tree of host arrays on every device."""
    return jax.device_put(tree, replicated(mesh))


def put_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places this host's slice of the groups as its part of the global arrays."""
    sharding = over_groups(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
