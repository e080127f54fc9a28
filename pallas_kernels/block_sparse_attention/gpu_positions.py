# SPDX-License-Identifier: Apache-2.0
"""The bias by relative positions in the GPU kernels: gathered from a small table, summed for the table's gradient.

A table of the relative positions between the first and the last change of bucket is a few hundred numbers a head, which stay in
the first-level cache.

Shapes: B batch, N rows, M rows with padding, H heads, W positions of the table, S buckets, o x l a tile of own by listed rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import guarded
from pallas_kernels.block_sparse_attention.gpu_parts import LOG2E, Plan
from pallas_kernels.position_bias import PositionBias


def add(args: dict[str, Array], bias: PositionBias | None, plan: Plan, *, own_queries: bool) -> None:
    """Adds to a kernel's arguments, which it sees whole, what it needs for a bias by positions; nothing for none."""
    if bias is None:
        return
    steps = bias.steps()
    first = steps.places[0] - 1
    # The table starts at 0 when its start is taken off the keys.
    queries, keys = bias.query_positions.astype(jnp.int32), bias.key_positions.astype(jnp.int32) - first
    own, listed = (queries, keys) if own_queries else (keys, queries)
    args["own_positions"], args["listed_positions"] = _filled(own, plan.own_length), _filled(listed, plan.listed_length)
    numbers = np.searchsorted(steps.places, np.arange(first, steps.places[-1] + 1), side="right")
    # Softmax is in base 2.
    args["table"] = bias.table.astype(jnp.float32).T[:, np.asarray(steps.buckets)[numbers]] * LOG2E
    args["places"] = jnp.asarray(steps.places, jnp.int32) - first


def own(refs: dict[str, Any], row: Any, tile: Any, plan: Plan) -> Int[Array, " o"] | None:
    """Positions of a program's own rows; None without a bias by positions."""
    if "table" not in refs:
        return None
    table = refs["own_positions"]
    return table[row if table.shape[0] > 1 else 0, pl.ds(tile * plan.own, plan.own)]


def relative(
    refs: dict[str, Any], row: Any, rows: Any, own: Int[Array, " o"], *, own_queries: bool
) -> Int[Array, "o l"]:
    """Relative positions of a tile, from the start of the table."""
    table = refs["listed_positions"]
    listed = table[row if table.shape[0] > 1 else 0, rows]
    return listed[None, :] - own[:, None] if own_queries else own[:, None] - listed[None, :]


def bias(refs: dict[str, Any], head: Any, relative: Int[Array, "o l"]) -> Float[Array, "o l"]:
    """The bias of a tile in base 2."""
    place = jnp.clip(relative, 0, refs["table"].shape[1] - 1)
    return guarded.take(refs["table"].at[head, place], mask=jnp.full(place.shape, True))


def no_sums(refs: dict[str, Any]) -> Float[Array, " S"]:
    """What `sum_buckets` starts from."""
    return jnp.zeros((sums_size(refs["places"].shape[0]),), jnp.float32)


def sums_size(places: int) -> int:
    """Room for the sums of all buckets."""
    return pl.next_power_of_2(places + 1)


def sum_buckets(
    refs: dict[str, Any], relative: Int[Array, "o l"], dlogits: Float[Array, "o l"], sums: Float[Array, " S"]
) -> Float[Array, " S"]:
    """`sums` of the gradients in each bucket with those of a tile.

    Most tiles lie in the first or the last bucket as a whole; of the others each bucket is a difference of two sums.
    """
    places, total = refs["places"], jnp.sum(dlogits)
    count = places.shape[0]
    number = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0)
    before, after = jnp.max(relative) < places[0], jnp.min(relative) >= places[count - 1]

    def part(step: Any, state: Any) -> Any:
        sums, above = state
        rest = jnp.sum(jnp.where(relative >= places[step], dlogits, 0.0))
        return sums + jnp.where(number == step, above - rest, 0.0), rest

    # A tile in one bucket has no parts to tell.
    parts = jnp.where(jnp.logical_or(before, after), jnp.int32(0), jnp.int32(count))
    sums, above = jax.lax.fori_loop(0, parts, part, (sums, total))
    end = jnp.where(before, jnp.int32(0), jnp.int32(count))
    return sums + jnp.where(number == end, above, 0.0)


def table_gradient(sums: Float[Array, "B H T S"], bias: PositionBias) -> Float[Array, "N H"]:
    """The gradient of the table from what `sum_buckets` made of all tiles."""
    buckets = np.asarray(bias.steps().buckets)
    found = jnp.sum(sums, axis=(0, 2)).T[: len(buckets)]
    return jnp.zeros(bias.table.shape, jnp.float32).at[buckets].set(found)


def _filled(positions: Int[Array, "b N"], length: int) -> Int[Array, "b M"]:
    """Rows that fill up the last block stand where the last one does, so that ranges stay narrow."""
    return jnp.pad(positions, ((0, 0), (0, length - positions.shape[1])), mode="edge")
