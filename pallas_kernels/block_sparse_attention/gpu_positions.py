# SPDX-License-Identifier: Apache-2.0
"""The bias by relative positions in the GPU kernels: gathered from a small table, summed for the table's gradient.

A table of the relative positions between the first and the last change of bucket is a few hundred numbers a head, which stay in
the first-level cache. Blocks whose pairs are all in the first or all in the last bucket, as most are in long sequences, are
open and read one number of it.

Shapes: B batch, N rows, M rows with padding, H heads, R own and C listed blocks, T own tiles, S room for buckets, o x l a tile
of own by listed rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import guarded
from pallas_kernels.block_sparse_attention.gpu_parts import LOG2E, Plan
from pallas_kernels.block_sparse_attention.index import BlockIndex
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
    # No position is so far that it reaches what fills up the places.
    places = np.full(pl.next_power_of_2(len(steps.buckets)), np.iinfo(np.int32).max)
    places[: len(steps.places)] = np.asarray(steps.places) - first
    args["places"] = jnp.asarray(places, jnp.int32)


def near(bias: PositionBias | None, index: BlockIndex, *, own_queries: bool) -> Bool[Array, "b 1 R C"] | None:
    """Blocks with pairs in several buckets, or in one that is neither the first nor the last; None without a bias."""
    if bias is None:
        return None
    places = bias.steps().places
    sides = (bias.query_positions, bias.key_positions)
    own, listed = (
        _filled(rows, blocks * size).reshape(rows.shape[0], blocks, size)
        for rows, blocks, size in zip(
            sides if own_queries else sides[::-1],
            (index.query_blocks, index.key_blocks),
            (index.block_q, index.block_k),
            strict=True,
        )
    )
    own, listed = own[:, :, None], listed[:, None]
    queries, keys = (own, listed) if own_queries else (listed, own)
    least, most = keys.min(-1) - queries.max(-1), keys.max(-1) - queries.min(-1)
    return ((most >= places[0]) & (least < places[-1]))[:, None]


@dataclasses.dataclass(frozen=True)
class Stands:
    """Where a program's own rows stand: `rows [o]`, `first` the first of them; `listed [M]` are those of listed rows."""

    rows: Int[Array, " o"]
    first: Any
    listed: Any
    own_queries: bool

    def relative(self, rows: Any) -> Int[Array, "o l"]:
        """Relative positions of a tile, from the start of the table."""
        listed = self.listed(rows)[None, :]
        return listed - self.rows[:, None] if self.own_queries else self.rows[:, None] - listed

    def after(self, rows: Any) -> Any:
        """Whether the pairs of a tile of an open block are in the last bucket, and not in the first."""
        listed = self.listed(rows.start)
        return (listed > self.first) if self.own_queries else (self.first > listed)


def stands(refs: dict[str, Any], row: Any, tile: Any, plan: Plan, *, own_queries: bool) -> Stands | None:
    """Positions of a program's rows; None without a bias by positions."""
    if "table" not in refs:
        return None
    own, listed = refs["own_positions"], refs["listed_positions"]
    line = row if own.shape[0] > 1 else 0
    first = tile * plan.own

    def of(rows: Any) -> Any:
        return listed[row if listed.shape[0] > 1 else 0, rows]

    return Stands(own[line, pl.ds(first, plan.own)], own[line, first], of, own_queries)


def bias(refs: dict[str, Any], head: Any, stands: Stands, rows: Any, closed: bool) -> Any:
    """The bias of a tile in base 2: `[o, l]`, or one number where the block is open."""
    end = refs["table"].shape[1] - 1
    if not closed:
        return refs["table"][head, jnp.where(stands.after(rows), end, 0)]
    place = jnp.clip(stands.relative(rows), 0, end)
    return guarded.take(refs["table"].at[head, place], mask=jnp.full(place.shape, True))


def sum_ends(stands: Stands, rows: Any, dlogits: Float[Array, "o l"], ends: list[Array]) -> list[Array]:
    """Adds the gradients of a tile of an open block to the sums `[o]` of the first bucket or of the last."""
    after, total = stands.after(rows), jnp.sum(dlogits, axis=1)
    return [ends[0] + jnp.where(after, 0.0, total), ends[1] + jnp.where(after, total, 0.0)]


def sum_buckets(
    refs: dict[str, Any], stands: Stands, rows: Any, dlogits: Float[Array, "o l"], sums: Float[Array, " S"]
) -> Float[Array, " S"]:
    """`sums` of the gradients in each bucket with those of a tile of queries, each bucket a difference of two sums."""
    places, relative, listed = refs["places"], stands.relative(rows), stands.listed(rows)
    number, all_places = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0), places[...]
    # A tile has no pairs in buckets before its least and after its greatest relative position.
    ends = jnp.min(listed) - jnp.max(stands.rows), jnp.max(listed) - jnp.min(stands.rows)
    least, most = (jnp.sum((all_places <= end).astype(jnp.int32)) for end in ends)

    def part(step: Any, state: Any) -> Any:
        sums, above = state
        rest = jnp.sum(jnp.where(relative >= places[step], dlogits, 0.0))
        return sums + jnp.where(number == step, above - rest, 0.0), rest

    sums, above = jax.lax.fori_loop(least, most, part, (sums, jnp.sum(dlogits)))
    return sums + jnp.where(number == most, above, 0.0)


def table_gradient(
    sums: Float[Array, "B H T S"], ends: tuple[Float[Array, "B H M"], ...], bias: PositionBias
) -> Float[Array, "N H"]:
    """The gradient of the table from what `sum_buckets` made of all near tiles and `sum_ends` of the others."""
    buckets = np.asarray(bias.steps().buckets)
    found = jnp.sum(sums, axis=(0, 2)).T[: len(buckets)]
    for number, end in zip((0, -1), ends, strict=True):
        found = found.at[number].add(jnp.sum(end, axis=(0, 2)))
    return jnp.zeros(bias.table.shape, jnp.float32).at[buckets].set(found)


def _filled(positions: Int[Array, "b N"], length: int) -> Int[Array, "b M"]:
    """Rows that fill up the last block stand where the last one does, so that ranges stay narrow."""
    return jnp.pad(positions, ((0, 0), (0, length - positions.shape[1])), mode="edge")
