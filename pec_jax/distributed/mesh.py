"""The device mesh, and what lies where on it; no model code.

The mesh has three axes, any of which may be 1:

- `data` and `fsdp` split the groups of an iteration. A group is never split, so that its
  statistics need no collective.
- `fsdp` also splits every parameter where it is stored; a layer gathers its own as it runs
  (`at_use`), and lets it go again.
- `tensor` splits the layers themselves: heads and hidden units.

Which logical axis of a parameter or activation goes where is said by `config.mesh.rules`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pec_jax.config import Config, ConfigError
from pec_jax.config.schema import MeshConfig
from pec_jax.types import PyTree, TrainState

Array = jax.Array
Names = Sequence[str | None]  # one logical axis name, or None, an axis of an array
# (logical axis names, shape) -> where an array of that kind lies
Placement = Callable[[Names, Sequence[int]], NamedSharding]

AXES = ("data", "fsdp", "tensor")
GROUPS = ("data", "fsdp")


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
      config: at most one of its mesh's axes is -1, which takes as many of the devices that are
        left as the groups divide over.
      devices: all of the machine's by default.

    Raises:
      ConfigError: too few devices, or groups that do not divide over them; or, on several hosts, a
        mesh that leaves devices out.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _mesh_sizes(config.mesh, config.batch.groups, len(devices))
    count = int(np.prod(sizes))
    if jax.process_count() > 1 and count != len(devices):
        raise ConfigError(
            f"config.mesh is {dict(zip(AXES, sizes))}, {count} devices, but the hosts have "
            f"{len(devices)} together, all of which must take part: choose another config.mesh, or "
            "a config.batch.groups that divides over them."
        )
    grid = mesh_utils.create_device_mesh(
        sizes, devices[:count], allow_split_physical_axes=True, contiguous_submeshes=False
    )
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _mesh_sizes(mesh: MeshConfig, groups: int, num_devices: int) -> tuple[int, int, int]:
    wanted = {axis: getattr(mesh, axis) for axis in AXES}
    free = [axis for axis, size in wanted.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"config.mesh: only one of {', '.join(free)} can be -1.")
    fixed = int(np.prod([size for size in wanted.values() if size != -1]))
    for axis in free:
        split = fixed // wanted["tensor"] if axis in GROUPS else 1  # of the groups, already
        fits = [
            n
            for n in range(1, num_devices // fixed + 1)
            if axis not in GROUPS or groups % (n * split) == 0
        ]
        wanted[axis] = max(fits, default=1)
    sizes = wanted["data"], wanted["fsdp"], wanted["tensor"]
    if np.prod(sizes) > num_devices:
        raise ConfigError(
            f"config.mesh needs {np.prod(sizes)} devices ({wanted}), but there are {num_devices}: "
            "lower one of its axes, or set it to -1 for what is left."
        )
    if groups % (sizes[0] * sizes[1]):
        raise ConfigError(
            f"config.batch.groups ({groups}) does not divide over config.mesh.data * "
            f"config.mesh.fsdp = {sizes[0] * sizes[1]} devices: groups are never split."
        )
    return sizes


@contextlib.contextmanager
def active(mesh: Mesh, config: Config) -> Iterator[None]:
    """Within it, `constrain` and `at_use` mean this mesh and the config's rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(_rules(config)):
        yield


def platform() -> str:
    """The platform that the program being traced is for: "cpu", "gpu" or "tpu".

    That of the active mesh's devices, whatever machine compiles for them; without a mesh, that of
    this machine. The one place to ask before a network is written differently for a platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _rules(config: Config) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, tuple(axes)) for name, axes in config.mesh.rules.items()]


def partition(
    names: Names,
    shape: Sequence[int],
    rules: Sequence[tuple[str, Any]],
    sizes: Mapping[str, int],
) -> PartitionSpec:
    """The mesh axes over which an array is split.

    Args:
      names: its logical axes.
      shape: its shape. A mesh axis that does not divide an array's axis is left out.
      rules: logical axis -> mesh axes; the first that is still free counts.
      sizes: of the mesh's axes.
    """
    spec: Any = nn.logical_to_mesh_axes(tuple(names), rules)
    parts = []
    for size, axes in zip(shape, spec):
        kept: tuple[str, ...] = ()
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if sizes[axis] > 1 and size % int(np.prod([sizes[a] for a in (*kept, axis)])) == 0:
                kept = (*kept, axis)
        parts.append(kept or None)
    return PartitionSpec(*parts)


def constrain(x: Array, *names: str | None) -> Array:
    """Says where an activation lies, by logical axes; nothing where no mesh is active."""
    return _constrain(x, names, nn.get_logical_axis_rules())


def over_batch(tree: PyTree, axis: int = 0) -> PyTree:
    """Says that images (or groups of them) are split over the devices along `axis`."""

    def split(x):
        return constrain(x, *("batch" if i == axis else None for i in range(x.ndim)))

    return jax.tree.map(split, tree)


def at_use(parameter: Array, *names: str | None) -> Array:
    """A parameter as a layer uses it: whole along `fsdp`, which only stores it in pieces.

    Said layer by layer, for the compiler, left to itself, may move the activations instead.
    """
    stored = nn.get_logical_axis_rules()
    rules = [(name, tuple(a for a in axes or () if a != "fsdp")) for name, axes in stored]
    return _constrain(parameter, names, rules)


def on_shards(function: Callable[..., Array], names: Names, *arrays: Array) -> Array:
    """`function` on every device for its own part of the arrays, without any communication.

    For kernels that the compiler cannot split.

    Args:
      function: from arrays to one array, all of which have the same logical axes.
      names: those axes.
      *arrays: alike in the axes that are split.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), list(nn.get_logical_axis_rules())
    if mesh.empty or mesh.size == 1 or not rules:
        return function(*arrays)
    spec = partition(names, arrays[0].shape, rules, mesh.shape)
    return jax.shard_map(function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(
        *arrays
    )


def _constrain(x: Array, names: Names, rules: Any) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not rules:
        return x
    return jax.lax.with_sharding_constraint(x, partition(names, x.shape, rules, mesh.shape))


def placement(mesh: Mesh, config: Config) -> Placement:
    """Where parameters lie: (logical axes, shape) -> sharding."""
    rules = _rules(config)

    def place(names: Names, shape: Sequence[int]) -> NamedSharding:
        vector = sum(name != "layers" for name in names) < 2  # a bias or a norm: too small to split
        spec = PartitionSpec() if vector else partition(names, shape, rules, mesh.shape)
        return NamedSharding(mesh, spec)

    return place


def state_shardings(
    state: TrainState, axes: PyTree, optimizer: optax.GradientTransformation, place: Placement
) -> TrainState:
    """Where a TrainState lies: moments, averages, old policies like their parameters, else whole.

    Args:
      state: arrays or abstract.
      axes: a tree like `state.params`, with a tuple of logical names for each array.
      optimizer: which made `state.opt_state`.
      place: from `placement`.
    """
    whole: Any = place((), ())
    params = jax.tree.map(lambda x, names: place(names, x.shape), state.params, axes)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, where: where,
        state.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(
        step=whole,
        params=params,
        ema=params,
        opt_state=moments,
        objective=dict.fromkeys(state.objective, params),
        constraints=jax.tree.map(lambda _: whole, state.constraints),
        skipped=whole,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_groups(mesh: Mesh) -> NamedSharding:
    """The leading axis (groups P, or images grouped as P * K) is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(GROUPS))


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places a tree of host arrays on every device; what lies on the mesh already stays."""

    def put(leaf):
        there = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
        return leaf if there and leaf.sharding.mesh == mesh else put_array(leaf, replicated(mesh))

    return jax.tree.map(put, tree)


def put_array(array: Any, sharding: jax.sharding.Sharding) -> Array:
    """A host array that every process has, as one global array; each host places its own part."""
    if sharding.is_fully_addressable:
        # On CPU the device takes aligned memory over as it is, without a copy.
        return jax.device_put(array, sharding, may_alias=True)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = put_array(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def local_groups(mesh: Mesh, groups: int) -> slice:
    """The groups that this process's devices work on; a run of neighbours.

    Raises:
      ConfigError: the mesh gives a process groups that are not neighbours.
    """
    places: Any = over_groups(mesh).addressable_devices_indices_map((groups,)).values()
    spans = {(index[0].start or 0, index[0].stop or groups) for index in places}
    start, stop = min(s for s, _ in spans), max(e for _, e in spans)
    if sum(e - s for s, e in spans) != stop - start:
        raise ConfigError(
            "config.mesh gives a host groups that are not neighbours: let config.mesh.tensor "
            "divide the devices of a host."
        )
    return slice(start, stop)


def put_batch(tree: PyTree, mesh: Mesh, groups: int) -> PyTree:
    """Places this host's groups (see `local_groups`) as its part of the global arrays [P, ...]."""
    sharding = over_groups(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (groups, *x.shape[1:])), tree
    )
