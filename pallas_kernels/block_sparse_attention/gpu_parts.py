# SPDX-License-Identifier: Apache-2.0
"""Pieces of the GPU kernels: tiles, lists in the order in which they are worked, masks, products.

A program owns a tile of rows of one side and walks the blocks that are listed for it, a tile of the other side a turn. Masks
on every block would cost a sixth of the time, so a list is put in order first: open blocks, in which every pair is attended and
every row is there, then the others. The kernels have one loop without any mask and one with all, and the compiler overlaps
loads and products in both.

Shapes: B batch, N rows, M rows with padding, H heads, C listed blocks; R own blocks, K list capacity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels import guarded
from pallas_kernels.block_sparse_attention.index import FULL, BlockIndex

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
LOWEST = float(jnp.finfo(jnp.float32).min)
# The matrix units' smallest side.
SMALLEST = 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one kernel walks its lists.

    Attributes:
      own, listed: rows of a tile of the side that programs own and of the side that is listed.
      own_block, listed_block: rows of their blocks. own_rows, listed_rows: rows there are. width: of a head.
      warps, stages: of a program: its threads by 32, and tiles in flight.
    """

    own: int
    listed: int
    own_block: int
    listed_block: int
    own_rows: int
    listed_rows: int
    width: int
    warps: int
    stages: int

    @property
    def own_length(self) -> int:
        """Rows with padding to whole blocks."""
        return -(-self.own_rows // self.own_block) * self.own_block

    @property
    def listed_length(self) -> int:
        """Rows with padding to whole blocks."""
        return -(-self.listed_rows // self.listed_block) * self.listed_block

    @property
    def tiles(self) -> int:
        """Programs along the own side."""
        return self.own_length // self.own

    @property
    def wide(self) -> int:
        """Columns of a tile: a power of two."""
        return max(SMALLEST, pl.next_power_of_2(self.width))

    @property
    def ragged(self) -> bool:
        """Whether the last listed block ends early."""
        return self.listed_rows != self.listed_length


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tile of listed rows.

    Attributes:
      number, start: its block, and its first row within it.
      tile: the number of the mask's tile; None where there are none.
      closed: whether pairs of it may be masked, rows may be missing, or a bias by positions may differ; static.
    """

    number: Any
    start: Any
    tile: Any
    closed: bool


def make_plan(kernel: str, index: BlockIndex, width: int, dtype: Any, *, positions: bool = False) -> Plan:
    """The tiles of a kernel, each within one block, with a bias by `positions` or without.

    Raises:
      NotImplementedError: blocks that hold no whole tile of at least 16 rows, heads wider than 256, or numbers of a size that
        no tiles are known for.
    """
    own, listed, warps, stages = _sizes(kernel, width, dtype, positions)
    for name, block in (("block_q", index.block_q), ("block_k", index.block_k)):
        if block % SMALLEST:
            raise NotImplementedError(
                f"the GPU kernels take blocks that are multiples of {SMALLEST}; got {name}={block}, the nearest is "
                f"{max(SMALLEST, round(block / SMALLEST) * SMALLEST)}"
            )
    # Tiles have power-of-two sides.
    sides = (min(size, block & -block) for size, block in ((own, index.block_q), (listed, index.block_k)))
    return Plan(*sides, index.block_q, index.block_k, index.queries, index.keys, width, warps, stages)


# Tiles `(own, listed)`, warps and stages by bytes of a number and for heads up to a width: the tallest own tile, since each
# reads the listed side anew, then the widest listed one, that the compiler for Hopper keeps in registers without a spill, with
# masks and bias; and three stages where 227 KiB of shared memory hold them. Exact float32 products have no matrix unit.
_SIZES = {
    (2, "forward"): {64: (128, 128, 8, 3), 128: (128, 128, 8, 3), 256: (128, 64, 8, 2)},
    (2, "query_gradient"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
    (2, "key_gradients"): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 16, 8, 2)},
    (4, "forward"): {64: (64, 16, 8, 2), 256: (32, 16, 8, 2)},
    (4, "query_gradient"): {64: (64, 32, 8, 2), 256: (32, 16, 8, 2)},
    (4, "key_gradients"): {128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
}
# Where a bias by positions takes registers too.
_POSITION_SIZES = {
    (2, "forward"): {128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    (2, "query_gradient"): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
    (2, "key_gradients"): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (32, 32, 4, 2)},
    (4, "forward"): {64: (64, 32, 8, 2), 256: (32, 16, 8, 2)},
    (4, "query_gradient"): {64: (64, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
    (4, "key_gradients"): {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 4, 2)},
    # Small tiles have pairs in few buckets.
    (2, "bucket_sums"): {256: (64, 32, 4, 2)},
    (4, "bucket_sums"): {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 4, 2)},
}


def _sizes(kernel: str, width: int, dtype: Any, positions: bool) -> tuple[int, int, int, int]:
    """Tiles, warps and stages."""
    found = (_POSITION_SIZES if positions else _SIZES).get((jnp.dtype(dtype).itemsize, kernel))
    if found is None:
        raise NotImplementedError(f"the GPU kernels take bfloat16, float16 and float32; got {jnp.dtype(dtype)}")
    for widest, size in found.items():
        if width <= widest:
            return size
    raise NotImplementedError(f"the GPU kernels take heads of up to {widest}; got a width of {width}")


def lists(
    index: BlockIndex, causal: bool, *, own_queries: bool, near: Bool[Array, "b 1 R C"] | None = None
) -> dict[str, Array]:
    """Tables of the lists, with open blocks before the others; `own_queries` is False for transposed lists.

    `ids [b, h, R, K]` and `counts [b, h, R]`; where not all are open, `opens [b, h, R]` entries before the first that is not;
    where there are tiles, `tile_of [b, h, R, K]`. `near` blocks are not open.
    """
    ids, counts = (jnp.asarray(leaf, jnp.int32) for leaf in (index.indices, index.counts))
    ragged = index.keys % index.block_k > 0
    if index.tile_of is None and not causal and not ragged and near is None:
        return {"ids": ids, "counts": counts}
    if near is not None:
        ids = jnp.broadcast_to(ids, (max(ids.shape[0], near.shape[0]), *ids.shape[1:]))
        counts = jnp.broadcast_to(counts, ids.shape[:-1])
    tile_of = jnp.full_like(ids, FULL) if index.tile_of is None else jnp.asarray(index.tile_of, jnp.int32)
    closed = tile_of != FULL
    if ragged:
        closed |= ids == index.key_blocks - 1
    if causal:
        rows = jnp.arange(index.query_blocks, dtype=jnp.int32)[:, None]
        first, last = rows * index.block_q, jnp.minimum((ids + 1) * index.block_k, index.keys) - 1
        if not own_queries:
            first, last = ids * index.block_k, jnp.minimum((rows + 1) * index.block_q, index.queries) - 1
        # Open if the first query of the one block sees the last key of the other.
        closed |= first + abs(index.keys - index.queries) < last
    if near is not None:
        closed |= jnp.take_along_axis(jnp.broadcast_to(near, (*ids.shape[:-1], near.shape[-1])), ids, axis=-1)
    listed = jnp.arange(ids.shape[-1]) < counts[..., None]
    # One number holds order, block and tile, so one sort without a payload does all.
    kinds = 1 if index.tiles is None else 1 + index.tiles.shape[0]
    packed = (closed * index.key_blocks + ids) * kinds + tile_of - FULL
    packed = jnp.sort(jnp.where(listed, packed, 2 * index.key_blocks * kinds - 1), axis=-1)
    table = {
        "ids": packed // kinds % index.key_blocks,
        "counts": counts,
        "opens": jnp.sum(listed & ~closed, axis=-1, dtype=jnp.int32),
    }
    return table if index.tile_of is None else table | {"tile_of": packed % kinds + FULL}


def walk(refs: dict[str, Any], place: tuple[Any, ...], plan: Plan, work: Callable[..., Any], state: Any) -> Any:
    """`state` after `work(entry, state)` for every tile of listed rows; `place` is where the list stands in the tables."""
    if "opens" not in refs:
        return _loop(refs, place, plan, work, 0, refs["counts"][place], state, closed=False)
    state = _loop(refs, place, plan, work, 0, refs["opens"][place], state, closed=False)
    return walk_closed(refs, place, plan, work, state)


def walk_closed(refs: dict[str, Any], place: tuple[Any, ...], plan: Plan, work: Callable[..., Any], state: Any) -> Any:
    """`walk` over what is not open."""
    return _loop(refs, place, plan, work, refs["opens"][place], refs["counts"][place], state, closed=True)


def _loop(
    refs: dict[str, Any],
    place: tuple[Any, ...],
    plan: Plan,
    work: Callable[..., Any],
    first: Any,
    end: Any,
    state: Any,
    *,
    closed: bool,
) -> Any:
    turns = plan.listed_block // plan.listed

    def turn(step: Any, state: Any) -> Any:
        entry = jax.lax.div(step, turns)
        tile = refs["tile_of"][(*place, entry)] if closed and "tile_of" in refs else None
        return work(Entry(refs["ids"][(*place, entry)], (step - entry * turns) * plan.listed, tile, closed), state)

    return jax.lax.fori_loop(first * turns, end * turns, turn, state)


def seen(
    refs: dict[str, Any], plan: Plan, own: Any, entry: Entry, causal: bool, own_queries: bool
) -> Bool[Array, "o l"] | None:
    """Which pairs of own rows, from row `own` on, and an entry's rows attend; None for all."""
    if not entry.closed:
        return None
    shape, masks = (plan.own, plan.listed), []
    rows = own + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = entry.number * plan.listed_block + entry.start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    if plan.ragged:
        masks.append(columns < plan.listed_rows)
    if causal:
        query, key = (rows, columns) if own_queries else (columns, rows)
        masks.append(query + abs(plan.listed_rows - plan.own_rows) >= key)
    if entry.tile is not None:
        inside = jax.lax.rem(own, plan.own_block)
        bank = refs["bank"][jnp.maximum(entry.tile, 0), pl.ds(inside, plan.own), pl.ds(entry.start, plan.listed)]
        masks.append((bank != 0) | (entry.tile == FULL))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """One matrix product, accumulated in float32; float32 operands are not rounded."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=exact, preferred_element_type=jnp.float32)


def last_padded(x: Float[Array, "... N"], length: int, fill: float = 0.0) -> Float[Array, "... M"]:
    """Float32, with `fill` up to `length` at the end."""
    widths = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return jnp.pad(x.astype(jnp.float32), widths, constant_values=fill)


def own(step: Any, share: int, plan: Plan, causal: bool) -> tuple[Any, Any]:
    """`(head among those that share keys, own tile)` of a step of the grid, for tiles of queries.

    Programs that start together read the same keys, so that all but one find them in the second-level cache. Under a causal
    mask the last queries, whose lists are longest, go first, so that no processor is left with one of them at the end.
    """
    tile = jax.lax.div(step, share)
    return jax.lax.rem(step, share), plan.tiles - 1 - tile if causal else tile


def place(table: Any, row: Any, head: Any, heads: int, tile: Any, plan: Plan) -> tuple[Any, Any, Any]:
    """Where the list of an own tile stands in tables `[b, h, R, ...]`, which rows and heads may share."""
    b, h = table.shape[:2]
    line = jax.lax.div(tile, plan.own_block // plan.own)
    return row if b > 1 else 0, jax.lax.div(head, heads // h), line


def add_bank(args: dict[str, Array], index: BlockIndex) -> None:
    """Adds the masks of partial tiles, a byte a pair."""
    if index.tiles is not None:
        args["bank"] = jnp.asarray(index.tiles).astype(jnp.int8)


def call(
    kernel: Callable[..., Any], args: dict[str, Array], specs: dict[str, pl.BlockSpec], plan: Plan, **options: Any
) -> Any:
    """The kernel over `args`; those without a spec are seen whole.

    Raises:
      NotImplementedError: an array of 2^31 numbers or more.
    """
    guarded.addressable(options["name"], args)
    whole = {name: pl.BlockSpec(leaf.shape, lambda *_, rank=leaf.ndim: (0,) * rank) for name, leaf in args.items()}
    params = plgpu.CompilerParams(num_warps=plan.warps, num_stages=plan.stages)
    return pl.pallas_call(kernel, in_specs=[whole | specs], compiler_params=params, **options)(args)
