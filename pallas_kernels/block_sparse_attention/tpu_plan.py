# SPDX-License-Identifier: Apache-2.0
"""What the TPU kernels share: block sizes and the reasons for them, the memory check, and the walk over lists.

The side that is listed lies whole in VMEM, one head at a time, so that a listed block is a slice at a dynamic index: no copy
starts and no latency shows, however short the lists. A grid step works a tile of several lists as one flat walk over
*items*, each up to W listed blocks of one list. The walk computes the products of the next item while the vector units work on
this one, across the ends of lists, which is what keeps the matrix units busy at 128 rows a list.

Shapes: B batch, H heads, R lists, S tiles of lists, r lists in a tile, K list capacity, W blocks in an item, p own rows of a
list, q rows of a listed block, d head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.block_sparse_attention.index import BlockIndex

LANES = 128
# Softmax runs in base 2, which saves a product for every exponential.
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
# Below every logit, and finite, so that differences are numbers.
LOWEST = float(jnp.finfo(jnp.float32).min)
# A place that a causal mask never reaches, and one that it always cuts.
NEVER, ALWAYS = 2**30, -(2**30)
# By the compiler's schedules, 512 rows of the listed side make the products of an item as long as its softmax; 1,024 own rows
# spread the start and end of a grid step thin (512 where a head is 256 wide). All of it stays under 10 MiB of VMEM.
_ITEM_ROWS, _TILE_ROWS, _LARGEST = 512, 1024, 512
# VMEM when no TPU is there to ask (interpreter), the share of it that blocks and scratch may take, and the share that the
# compiler gets, which needs the difference for registers that it spills.
_VMEM_BYTES, _PLANNED, _ASKED = 64 * 2**20, 0.78, 0.95


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a kernel over the lists of one side.

    Attributes:
      own, listed: rows of a working block on the two sides; 128 to 512, dividing the index's blocks.
      rows: r, lists worked in a grid step; tiles: S.
      width: W; capacity: K, a multiple of W; blocks: listed blocks there are.
      chunk, depth: own and listed rows whose logits are worked at a time, as many as the matrix unit is wide, or 128.
    """

    own: int
    listed: int
    rows: int
    tiles: int
    width: int
    capacity: int
    blocks: int
    chunk: int
    depth: int

    @property
    def own_length(self) -> int:
        """Own rows of all tiles, padding included."""
        return self.own * self.rows * self.tiles

    @property
    def listed_length(self) -> int:
        """Rows of the listed side, padding included."""
        return self.listed * self.blocks

    @property
    def step_rows(self) -> int:
        """Own rows of a grid step."""
        return self.own * self.rows


def make_plan(index: BlockIndex, width: int) -> Plan:
    """Block sizes for the lists of `index` and heads of `width`.

    Raises:
      NotImplementedError: blocks that are not multiples of 128, which is the width of a register.
    """
    for name, size in (("block_q", index.block_q), ("block_k", index.block_k)):
        if size % LANES:
            nearest = max(LANES, round(size / LANES) * LANES)
            raise NotImplementedError(f"{name}={size} is not a multiple of {LANES}; the nearest supported is {nearest}")
    own, listed = _working(index.block_q), _working(index.block_k)
    lists = index.query_blocks * (index.block_q // own)
    tiles = -(-lists * own // max(_TILE_ROWS * LANES // max(width, LANES), own))
    rows = -(-lists // tiles)
    width = max(1, _ITEM_ROWS // listed)
    capacity = index.indices.shape[-1] * (index.block_k // listed)
    unit = _matrix_width()
    return Plan(
        own=own,
        listed=listed,
        rows=rows,
        # No tile without a list.
        tiles=-(-lists // rows),
        width=width,
        capacity=-(-capacity // width) * width,
        blocks=index.key_blocks * (index.block_k // listed),
        chunk=unit if own % unit == 0 else LANES,
        depth=unit if listed % unit == 0 else LANES,
    )


def _working(block: int) -> int:
    return next(size for size in range(_LARGEST, 0, -LANES) if block % size == 0)


def _tpu_info() -> Any:
    """What the chip is, or None where there is none to ask."""
    try:
        return pltpu.get_tpu_info()
    except (ValueError, NotImplementedError, RuntimeError):
        return None


def _matrix_width() -> int:
    info = _tpu_info()
    return LANES if info is None else info.mxu_column_size


def _vmem() -> int:
    info = _tpu_info()
    return _VMEM_BYTES if info is None else info.vmem_capacity_bytes


def fits(per_row: int, rows: int, fixed: int) -> bool:
    """Whether rows that lie in VMEM whole fit; arguments as in `vmem_limit`."""
    return per_row * rows + fixed <= int(_vmem() * _PLANNED)


def vmem_limit(per_row: int, rows: int, fixed: int, name: str) -> tuple[int, int]:
    """How many copies of the rows that lie in VMEM whole fit, 2 or 1, and the bytes of VMEM to ask the compiler for.

    Args:
      per_row: bytes of each of the `rows` rows; fixed: of everything else; name: of the rows.

    Raises:
      NotImplementedError: not one copy fits.
    """
    there = _vmem()
    room = int(there * _PLANNED)
    if (needed := per_row * rows + fixed) > room:
        longest = max(0, (room - fixed) // max(per_row, 1) // LANES * LANES)
        raise NotImplementedError(
            f"{rows} {name} of one head need {needed / 2**20:.1f} MiB of VMEM and there are {room / 2**20:.1f}; "
            f"the longest supported is {longest}, or cut the {name} in parts and join the outputs by their lse"
        )
    return (2 if 2 * per_row * rows + fixed <= room else 1), int(there * _ASKED)


def vmem_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in VMEM, where the last two axes are padded to whole registers."""
    *lead, rows, columns = shape
    size = jnp.dtype(dtype).itemsize
    sublanes = 32 // size
    return math.prod(lead) * -(-rows // sublanes) * sublanes * -(-columns // LANES) * LANES * size


def tables(index: BlockIndex, plan: Plan) -> tuple[list[Array], Int[Array, "b h S 1 n"], Array | None]:
    """Lists for the walk, of working blocks.

    Returns:
      Lists `[b, h, S, 1, r K]` of block numbers and, with tiles, of tile numbers (0 for none); counts `[b, h, S, 1, r + 2]`,
      the last two being the count 0 of a list that takes idle items, and the number of items, which is even; and the tiles
      `[t, q, p]` as additive bfloat16 masks, or None.
    """
    finer_q, finer_k = index.block_q // plan.own, index.block_k // plan.listed
    counts = _tiled(jnp.repeat(jnp.asarray(index.counts), finer_q, axis=2)[..., None] * finer_k, plan)[..., 0]
    # An empty list has one item, which is idle.
    items = jnp.sum(jnp.maximum(-(-counts // plan.width), 1), axis=-1, keepdims=True)
    items += items % 2
    counts = jnp.concatenate([counts, jnp.zeros_like(items), items], axis=-1)[:, :, :, None, :]
    places = jnp.arange(finer_k, dtype=jnp.int32)
    numbers = jnp.asarray(index.indices)[..., None] * finer_k + places
    lists = [_flat(jnp.repeat(numbers.reshape(*numbers.shape[:3], -1), finer_q, axis=2), plan)]
    if index.tile_of is None:
        return lists, counts, None
    # Tile 0 is the open one; a tile of the index becomes finer_q x finer_k of them.
    tile_of = jnp.asarray(index.tile_of)[..., None, :, None]
    inner = (jnp.arange(finer_q, dtype=jnp.int32) * finer_k)[:, None, None] + places
    tile_of = jnp.where(tile_of < 0, 0, 1 + tile_of * (finer_q * finer_k) + inner)
    lists.append(_flat(tile_of.reshape(*tile_of.shape[:2], -1, tile_of.shape[-2] * finer_k), plan))
    bank = jnp.asarray(index.tiles).reshape(-1, finer_q, plan.own, finer_k, plan.listed)
    bank = bank.transpose(0, 1, 3, 4, 2).reshape(-1, plan.listed, plan.own)
    bank = jnp.where(bank, 0.0, -jnp.inf).astype(jnp.bfloat16)
    return lists, counts, jnp.pad(bank, ((1, 0), (0, 0), (0, 0)))


def _tiled(x: Int[Array, "b h R n"], plan: Plan) -> Int[Array, "b h S r n"]:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.rows * plan.tiles - x.shape[2]), (0, 0)))
    return x.reshape(*x.shape[:2], plan.tiles, plan.rows, x.shape[-1])


def _flat(x: Int[Array, "b h R K"], plan: Plan) -> Int[Array, "b h S 1 rK"]:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, plan.capacity - x.shape[3])))
    return _tiled(x, plan).reshape(*x.shape[:2], plan.tiles, 1, -1)


def walk(
    counts: Any,
    plan: Plan,
    put: Callable[..., None],
    use: Callable[..., None],
    opens: Callable[..., Any],
    stream: Any = None,
) -> None:
    """Runs `put(buffer, list, start)` an item ahead of `use(buffer, list, start, count, mask)` over all items of a tile.

    `start` is the place in the list of an item's first block; those at and after `count` are idle. Items without any block go
    to the spare list at the end, and what they leave there is never read. There are two buffers. `opens(list, start, count)`
    says whether an item needs no mask: a Python bool for all items alike, or a traced one, and then there are two branches.
    A `stream` fetches the blocks of items from HBM.
    """

    def after(row: Any, start: Any) -> tuple[Any, Any]:
        done = start + plan.width >= counts[0, row]
        return jnp.where(done, jnp.minimum(row + 1, plan.rows), row), jnp.where(done, 0, start + plan.width)

    def own(row: Any) -> Any:
        return jnp.where(counts[0, row] > 0, row, plan.rows)

    def pair(_: Any, first: tuple[Any, Any]) -> tuple[Any, Any]:
        second = after(*first)
        third = after(*second)

        def work(mask: bool) -> None:
            for buffer, item, ahead in ((0, first, second), (1, second, third)):
                if stream is not None:
                    stream.start("put", buffer, *after(*ahead))
                    stream.start("use", 1 - buffer, *ahead)
                    # Nothing may wait between the two: the compiler works them side by side.
                    stream.wait("put", 1 - buffer)
                    stream.wait("use", buffer)
                put(1 - buffer, *ahead)
                use(buffer, own(item[0]), item[1], counts[0, item[0]], mask)

        both = [opens(*item, counts[0, item[0]]) for item in (first, second)]
        if isinstance(both[0], bool):
            work(not both[0])
        else:
            jax.lax.cond(jnp.logical_and(*both), lambda: work(False), lambda: work(True))
        return third

    first = (jnp.int32(0), jnp.int32(0))
    if stream is not None:
        stream.start("put", 0, *first)
        stream.start("put", 1, *after(*first))
        stream.start("use", 0, *first)
        stream.wait("put", 0)
    put(0, *first)
    jax.lax.fori_loop(0, counts[0, plan.rows + 1] // 2, pair, first)
    if stream is not None:
        # What was fetched for items after the last one.
        stream.wait("put", 1)
        stream.wait("use", 0)
