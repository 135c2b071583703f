"""One mechanical mapping between torch state dicts and our variables, for every network.

Modules are named as in torch, dots included, so the path of a leaf is its torch name:

- `kernel` is torch's `weight`: [in, out] <- [out, in] of a linear layer, [kh, kw, in, out] <-
  [out, in, kh, kw] of a convolution, of any number of axes;
- `scale` (norms) and `embedding` are `weight`; every other leaf keeps its name and layout;
- a module called `blocks.2:5` is a scanned run: its leaves are torch's layers blocks.2, blocks.3
  and blocks.4, stacked on a new first axis.

The collections "params" and "buffers" are stored, others (such as "lora") are not. Names with
"." and ":" pass through linen and orbax unchanged.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from pec_jax.distributed.mesh import put_array
from pec_jax.models.layers import RUN_NAME, expand_runs
from pec_jax.weights.layouts import uncompiled
from pec_jax.weights.tensors import Tensors, WeightsError

PyTree = Any
STORED = ("params", "buffers")
LISTED = 5  # names an error message shows
ALIGNMENT = 64  # bytes


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where one leaf of our variables stands in a torch state dict.

    Attributes:
        path: keys in the variables, collection first.
        names: the torch tensors, one a layer of a scanned run, else one.
        axes: our axes in terms of torch's, e.g. (1, 0) for a linear kernel.
        stacked: whether the leaf has a leading layer axis.
        logical: the logical name of each of our axes, or None.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    axes: tuple[int, ...]
    stacked: bool
    logical: tuple[str | None, ...]

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each torch tensor, given the leaf's."""
        shape = tuple(shape[1:] if self.stacked else shape)
        return tuple(shape[self.axes.index(i)] for i in range(len(shape)))


def leaves(variables: PyTree) -> Iterator[tuple[Leaf, Any]]:
    """Each stored leaf of the variables with its place in torch's state dict.

    Args:
        variables: {"params": ..., "buffers": ...}, arrays or abstract, boxed or not.

    Yields:
        (place, leaf).
    """
    for collection in STORED:
        for path, box in traverse_util.flatten_dict(dict(variables.get(collection, {}))).items():
            value = unbox(box)
            modules, leaf = path[:-1], path[-1]
            stacked = any(RUN_NAME.fullmatch(part) for part in modules)
            ndim = len(value.shape) - stacked
            axes = tuple(range(ndim))
            if leaf == "kernel":
                axes = (*range(2, ndim), 1, 0)
            suffix = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
            names = tuple(f"{name}.{suffix}" if name else suffix for name in expand_runs(modules))
            logical = tuple(getattr(box, "names", (None,) * len(value.shape)))
            yield Leaf((collection, *path), names, axes, stacked, logical), value


def boxed_variables(module: nn.Module, *args: Any, method: Any = None) -> PyTree:
    """Shapes and logical axes of a module's variables; no memory is taken.

    Args:
        module: a linen module.
        *args: shapes (`jax.ShapeDtypeStruct`) or arrays that its call takes.
        method: what to call instead of `__call__`.

    Returns:
        {"params": ..., "buffers": ...} of `jax.ShapeDtypeStruct` in linen's boxes.
    """
    init: Callable[..., Any] = lambda *a: module.init(jax.random.key(0), *a, method=method)  # noqa: E731
    with nn.logical_axis_rules(()):  # shapes are asked for, and not placed on a mesh
        return jax.eval_shape(init, *args)


def abstract_variables(module: nn.Module, *args: Any, method: Any = None) -> PyTree:
    """`boxed_variables` without the boxes: shapes alone."""
    return unbox(boxed_variables(module, *args, method=method))


def unbox(variables: PyTree) -> PyTree:
    """Shapes without their boxes, whatever mesh is active."""
    with nn.logical_axis_rules(()):
        return nn.unbox(variables)


def placed_shapes(boxes: PyTree, *, dtype: Any = None, sharding: Any = None) -> PyTree:
    """What `from_torch` would load, as shapes: each of its dtype and in its place.

    Args and Returns: as `from_torch`, with `jax.ShapeDtypeStruct` for arrays.
    """
    flat = {}
    for leaf, expected in leaves(boxes):
        where = sharding(leaf.logical, expected.shape) if callable(sharding) else sharding
        target = _kept_in(expected, dtype)
        flat[leaf.path] = jax.ShapeDtypeStruct(expected.shape, target, sharding=where)
    return traverse_util.unflatten_dict(flat)


def logical_axes(variables: PyTree) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """Path of each stored leaf, collection first -> the names of its axes.

    Args:
        variables: from `boxed_variables`.
    """
    return {leaf.path: leaf.logical for leaf, _ in leaves(variables)}


def from_torch(
    tensors: Mapping[str, np.ndarray],
    abstract_variables: PyTree,
    *,
    ignore: Sequence[str] = (),
    dtype: Any = None,
    sharding: Any = None,
) -> PyTree:
    """Variables from a torch state dict, read tensor by tensor.

    Args:
        tensors: torch name -> array; `Tensors`, also of a compiled model, or a dict.
        abstract_variables: the shapes expected, boxed or not.
        ignore: regular expressions; an extra tensor whose whole name matches one is no error.
        dtype: of the leaves but for scalars, which keep theirs; by default the expected (fp32).
        sharding: where each leaf goes as soon as it is read, so that the host never holds more
            than one leaf beside what its own devices keep; a sharding for all, or a `Placement`;
            None leaves numpy arrays.

    Returns:
        {"params": ..., "buffers": ...}.

    Raises:
        WeightsError: a tensor is missing, unexpected, or of another shape; the message
            names it, both shapes, and the file.
    """
    tensors = uncompiled(tensors) if isinstance(tensors, Tensors) else tensors
    check_tensors(tensors, abstract_variables, ignore)
    flat: dict[tuple[str, ...], Any] = {}
    for leaf, expected in leaves(abstract_variables):
        target = _kept_in(expected, dtype)
        array = _aligned(expected.shape, target)
        for i, name in enumerate(leaf.names):
            value = np.transpose(np.asarray(tensors[name]), leaf.axes)
            array[(i,) if leaf.stacked else ...] = value.astype(target, copy=False)
        if sharding is not None:
            where = sharding(leaf.logical, array.shape) if callable(sharding) else sharding
            flat[leaf.path] = put_array(array, where)
        else:
            flat[leaf.path] = array
    return traverse_util.unflatten_dict(flat)


def check_tensors(
    tensors: Mapping[str, np.ndarray], abstract_variables: PyTree, ignore: Sequence[str] = ()
) -> None:
    """Checks names and shapes of a torch state dict; no tensor is read.

    Args and Raises: as `from_torch`.
    """
    source = ""
    if isinstance(tensors, Tensors):
        source, tensors = f"{tensors.directory}: ", uncompiled(tensors)
    plan = list(leaves(abstract_variables))
    wanted = {name for leaf, _ in plan for name in leaf.names}
    if missing := sorted(wanted - set(tensors)):
        raise WeightsError(
            f"{source}{len(missing)} tensors are missing, such as {_listing(missing)}; the file is "
            "incomplete, or its config.json describes another network"
        )
    extra = sorted(
        name for name in set(tensors) - wanted if not any(re.fullmatch(p, name) for p in ignore)
    )
    if extra:
        raise WeightsError(
            f"{source}{len(extra)} tensors have no place in the network, such as "
            f"{_listing(extra)}; config.json describes another network"
        )
    for leaf, expected in plan:
        for name in leaf.names:
            _check_shape(tensors, name, leaf.torch_shape(expected.shape))


def _kept_in(expected: Any, dtype: Any) -> np.dtype:
    """The dtype of a leaf; a lone scalar keeps its own.

    CLIP's logit scale in bfloat16, 4.59375 for 4.60517, would make every score 1.1% smaller.
    """
    return np.dtype(expected.dtype if dtype is None or not expected.shape else dtype)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that starts at a multiple of what XLA asks for."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_shape(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> None:
    if isinstance(tensors, Tensors):
        found, source = tensors.shape(name), f"{tensors.file(name)}: "
    else:
        found, source = tuple(tensors[name].shape), ""
    if found != shape:
        raise WeightsError(
            f"{source}tensor {name!r} has shape {list(found)}, expected {list(shape)}; the file "
            "and config.json describe different networks"
        )


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(name) for name in names[:LISTED]) + more


def to_torch(variables: PyTree) -> dict[str, np.ndarray]:
    """The torch state dict of variables, the inverse of `from_torch`.

    Args:
        variables: {"params": ..., "buffers": ...}, boxed or not; other collections are left out.

    Returns:
        Torch name -> contiguous array, in the leaf's dtype.
    """
    tensors = {}
    for leaf, value in leaves(variables):
        array = np.asarray(jax.device_get(value))
        inverse = tuple(np.argsort(leaf.axes))
        for i, name in enumerate(leaf.names):
            layer = array[i] if leaf.stacked else array
            tensors[name] = np.asarray(np.transpose(layer, inverse), order="C")
    return tensors


def count_parameters(variables: PyTree) -> int:
    """Number of trainable scalars, the collection "params" only."""
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(nn.unbox(variables["params"])))
