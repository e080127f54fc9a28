# SPDX-License-Identifier: Apache-2.0
"""Kernels under automatic sharding: each device runs the kernel on its own rows of the batch.

The partitioner cannot look into a TPU kernel and refuses a program that holds one, so the kernel goes into a `shard_map`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def by_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, with its batch (the first axis of every array and every result) divided over the mesh in use.

    The batch lies along all axes of the mesh that the partitioner manages, as everywhere in this codebase. Without such axes
    (a single device, or inside a `shard_map`), or where the batch does not divide, every device runs all rows.
    Arrays may be None or trees of arrays; what is named `whole` is a tree that every device gets as it is.
    """

    @functools.wraps(function)
    def call(*arrays: Any, whole: Any = None, **options: Any) -> Any:
        own = functools.partial(function, **options)
        run = own if whole is None else lambda *arrays: own(*arrays[:-1], whole=arrays[-1])
        arrays = arrays if whole is None else (*arrays, whole)
        mesh = jax.sharding.get_abstract_mesh()
        automatic = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
        devices = math.prod(mesh.shape[name] for name in automatic)
        if devices == 1:
            return run(*arrays)
        divides = arrays[0].shape[0] % devices == 0
        spec = PartitionSpec(tuple(automatic)) if divides else PartitionSpec()
        # A kernel does not say over which axes its results vary.
        divided = jax.shard_map(
            run,
            in_specs=spec if whole is None else (*(spec,) * (len(arrays) - 1), PartitionSpec()),
            out_specs=spec,
            axis_names=set(automatic),
            check_vma=False,
        )
        return divided(*arrays)

    return call
