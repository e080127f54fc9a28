# SPDX-License-Identifier: Apache-2.0
"""One mesh and one table from logical axis names to mesh axes: how parameters and batches lie on the devices.

Layers name the axes of their parameters ("embed", "mlp", ...); nothing else in the code base knows about devices. The
training and evaluation steps are jitted with the shardings built here, and XLA's partitioner inserts the collectives.

Presets:
  none: one device.
  dp: data parallel. The batch is split over all devices, parameters and optimiser state are replicated.
  fsdp: fully sharded data parallel. The batch is split over all devices; so is every matrix, along one axis, and with
    it its optimiser state and moving average. Source: Rajbhandari et al. 2020 (ZeRO), stage 3.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
PRESETS = ("none", "dp", "fsdp")

# The batch is split over both axes, whatever the preset.
BATCH_SPEC = PartitionSpec(AXES)

# Logical axis name -> mesh axis under each preset. The first row that fits a parameter wins: its name is an axis of
# the parameter, that axis divides evenly, and the mesh axis is not yet used. "embed" comes first because every large
# matrix of a transformer has it; the others serve where the model width does not divide by the number of devices.
RULES = (
    # name       dp    fsdp
    ("embed", None, "fsdp"),
    ("mlp", None, "fsdp"),
    ("vocab", None, "fsdp"),
    ("qkv", None, "fsdp"),
    ("heads", None, "fsdp"),
    ("head_dim", None, None),
    ("patch", None, "fsdp"),
    ("position", None, None),
    ("classes", None, None),
    ("norm", None, None),
    ("gate", None, None),
    ("router", None, None),
    ("predictor", None, None),
    ("exit", None, None),
    ("buckets", None, None),
    ("layers", None, None),  # the scan axis: each step of the scan would have to gather its slice
)
_COLUMN = {"none": 1, "dp": 1, "fsdp": 2}
LOGICAL_NAMES = tuple(row[0] for row in RULES)

# A parameter of more elements than this that stays whole on every device defeats fsdp: 4 MiB in float32.
LARGE_LEAF = 2**20


def make_mesh(preset: str = "dp", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh with axes ("data", "fsdp"), of type Auto (the partitioner decides inside jit).

    Args:
      preset: "dp" gives shape (n, 1), "fsdp" (1, n), "none" (1, 1) on the first device.
      devices: the devices to use; None means all devices of all processes.

    Raises:
      ValueError: an unknown preset.
    """
    _check_preset(preset)
    devices = list(jax.devices() if devices is None else devices)
    if preset == "none":
        devices = devices[:1]
    shape = (1, len(devices)) if preset == "fsdp" else (len(devices), 1)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Traces and runs on `mesh`, with every activation of `layers/` split along the batch."""
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", AXES),)):
        yield


def each_device_alone(function: Any) -> Any:
    """`function` without constraints on activations, for the body of a `shard_map`, where each device sees its own rows."""

    @functools.wraps(function)
    def alone(*arguments: Any) -> Any:
        with nn.logical_axis_rules(()):
            return function(*arguments)

    return alone


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises ValueError unless each microbatch gives every device the same number of examples, at least one."""
    shards = mesh.size * accumulate
    if batch_size % shards:
        raise ValueError(
            f"batch_size={batch_size} does not divide by {mesh.size} devices x accumulate={accumulate} = {shards}; "
            f"the nearest sizes that do: {max(batch_size // shards, 1) * shards}, {-(-batch_size // shards) * shards}."
        )


def shard_batch(mesh: Mesh, host_batch: Any) -> Any:
    """Puts this process's part of a batch onto its devices; the result is the global batch.

    Args:
      host_batch: a tree of numpy arrays [B / processes, ...].

    Raises:
      ValueError: a leaf whose leading axis does not divide over this process's devices, or that is not numeric.
    """
    sharding = batch_sharding(mesh)
    local_devices = len(mesh.local_devices)

    def place(path: tuple, leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        if leaf.dtype.kind not in "biufV":  # V: bfloat16 and its kin
            raise ValueError(
                f"batch{name} has dtype {leaf.dtype}, which no device holds; drop or encode it in the data."
            )
        if leaf.ndim == 0 or leaf.shape[0] % local_devices:
            raise ValueError(
                f"batch{name} has shape {leaf.shape}; its leading axis must divide by {local_devices} devices."
            )
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree_util.tree_map_with_path(place, host_batch)


def split_microbatches(mesh: Mesh, batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...], inside jit, each microbatch split over all devices.

    Microbatch i takes rows i, i + count, ...: each device then keeps the rows it has, and nothing is sent.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, AXES))

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, sharding)

    return jax.tree.map(split, batch)


def param_shardings(mesh: Mesh, preset: str, boxed_abstract_variables: Any) -> Any:
    """The sharding of every parameter, by RULES.

    Vectors (rank 1, the "layers" axis not counted) stay replicated: splitting them costs a collective and saves
    nothing. An axis that does not divide by the size of its mesh axis is passed over.

    Args:
      boxed_abstract_variables: what `jax.eval_shape` of flax's `init` returns: a tree whose leaves are boxes
        (`nn.LogicallyPartitioned`, `nn.Partitioned`) or plain arrays or shapes, which are replicated.

    Returns:
      The same tree without boxes, of NamedSharding.

    Raises:
      ValueError: a logical name that RULES lacks, a box with the wrong number of names, or, under fsdp on more than
        one device, a parameter of more than LARGE_LEAF elements that no rule splits.
    """
    _check_preset(preset)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        shape = tuple(meta.unbox(leaf).shape)
        names = leaf.names if isinstance(leaf, meta.Partitioned) else (None,) * len(shape)
        spec = _spec(jax.tree_util.keystr(path), shape, names, preset, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, boxed_abstract_variables, is_leaf=is_box)


def is_box(node: Any) -> bool:
    """Whether a tree node is a flax box around a parameter (`nn.LogicallyPartitioned`, `nn.Partitioned`)."""
    return isinstance(node, meta.AxisMetadata)


def _spec(path: str, shape: tuple, names: tuple, preset: str, mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of one parameter; see `param_shardings`."""
    if len(names) != len(shape):
        raise ValueError(f"{path} has shape {shape} but axis names {names}; give one name (or None) for each axis.")
    unknown = [name for name in names if name is not None and name not in LOGICAL_NAMES]
    if unknown:
        raise ValueError(
            f"{path} has logical axis {unknown[0]!r}, which experiments.parallel.RULES lacks. Known names: "
            f"{', '.join(LOGICAL_NAMES)}. Add a row there if the axis is new."
        )
    spec: list[str | None] = [None] * len(shape)
    if sum(name != "layers" for name in names) > 1:
        for row in RULES:
            mesh_axis = row[_COLUMN[preset]]
            if row[0] not in names or mesh_axis is None or mesh_axis in spec:
                continue
            axis = names.index(row[0])
            if shape[axis] % mesh.shape[mesh_axis] == 0:
                spec[axis] = mesh_axis
    whole = all(axis is None for axis in spec)
    if preset == "fsdp" and mesh.shape["fsdp"] > 1 and whole and math.prod(shape) > LARGE_LEAF:
        raise ValueError(
            f"{path} {shape} with axes {names} has {math.prod(shape)} elements (> {LARGE_LEAF}), but no axis of it can "
            f"be split over {mesh.shape['fsdp']} devices under preset 'fsdp'. Name its axes, make one divisible, or "
            "use preset 'dp'."
        )
    return PartitionSpec(*spec)


def inherit_shardings(mesh: Mesh, tree: Any, params: Any, shardings: Any) -> Any:
    """Shardings for a tree that holds copies of the parameters: a train state with moments and moving averages.

    A leaf inherits from the parameter whose path is the end of the leaf's own path (`opt_state[1].mu['a']['kernel']`
    from `['a']['kernel']`), if the shapes agree; all other leaves (counters, factored moments) are replicated.

    Args:
      tree: arrays or shapes.
      params, shardings: trees of equal structure, the second from `param_shardings`.
    """
    by_path = {
        path: (tuple(leaf.shape), sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(shardings), strict=True
        )
    }
    default = replicated(mesh)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = by_path.get(path[start:], (None, None))
            if shape == tuple(leaf.shape):
                return sharding
        return default

    return jax.tree_util.tree_map_with_path(place, tree)


def abstract(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings, for ahead-of-time compilation and for restoring."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _check_preset(preset: str) -> None:
    """Raises ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"parallel.preset is {preset!r}; known presets: {', '.join(PRESETS)}.")


class Collective(NamedTuple):
    """One array that one collective instruction produces, on one device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|(?:bf|[sufc])\d+\w*)\[([\d,]*)\]")


def collectives(compiled: Any) -> list[Collective]:
    """The collectives in a compiled program: what it sends between devices.

    One row for each array that a collective instruction produces (a combined all-reduce gives several). Bytes are those
    of the result on one device. An instruction inside a loop or a branch counts once. Both forms, synchronous and
    `-start`/`-done`, are read.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or the HLO text itself.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    rows = []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line.split(", metadata=")[0])
        if not match:
            continue
        result, kind, start = match.groups()
        arrays = _ARRAY.findall(result)
        if start and kind in ("all-gather", "collective-permute"):
            # The started form carries (operands, results, and for a permute two scalar context words).
            arrays = [a for a in arrays if kind == "all-gather" or a != ("u32", "")]
            arrays = arrays[len(arrays) // 2 :]
        for dtype, dims in arrays:
            shape = tuple(int(d) for d in dims.split(",") if d)
            rows.append(Collective(kind, dtype, shape, math.prod(shape) * _bits(dtype) // 8))
    return rows


def _bits(dtype: str) -> int:
    """Bits of one element of an HLO element type: f32, bf16, s4, f8e4m3fn, pred, ..."""
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 0
