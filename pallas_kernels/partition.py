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


def by_batch(function: Callable[..., Any], *, shared: tuple[int, ...] = ()) -> Callable[..., Any]:
    """`function` of arrays, with its batch (the first axis of arrays and of results) divided over the mesh in use.

    The batch lies along all axes of the mesh that the partitioner manages, as everywhere in this codebase. Without such axes
    (a single device, or inside a `shard_map`), or where the batch does not divide, every device runs all rows.

    Arguments are pytrees; the first one tells the batch. Those at the places `shared` (weights, sinks), and arrays with a
    single row for all of the batch, are whole on every device; their gradients are summed over devices.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        automatic = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
        devices = math.prod(mesh.shape[name] for name in automatic)
        if devices == 1:
            return function(*arguments, **options)
        batch = jax.tree.leaves(arguments[0])[0].shape[0]
        spec = PartitionSpec() if batch % devices else PartitionSpec(tuple(automatic))

        def placed(place: int, argument: Any) -> Any:
            whole = place in shared
            return jax.tree.map(lambda leaf: PartitionSpec() if whole or leaf.shape[0] == 1 else spec, argument)

        # A kernel does not say over which axes its results vary.
        divided = jax.shard_map(
            functools.partial(function, **options),
            in_specs=tuple(placed(*each) for each in enumerate(arguments)),
            out_specs=spec,
            axis_names=set(automatic),
            check_vma=False,
        )
        return divided(*arguments)

    return call
