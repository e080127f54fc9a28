# SPDX-License-Identifier: Apache-2.0
"""Compaction and expansion on the TPU: a product with a 0/1 matrix, tile by tile along a staircase.

Rows keep their order, so the pairs of a token tile and a slot tile that share rows form a staircase: each step goes on to the
next token tile or to the next slot tile, `tiles of tokens + tiles of slots - 1` steps in all. At each step the matrix unit
moves the rows of one tile to their places in the other by a product with `P[m, n] = (place[n] == m)`, made on the fly from
the places. A row is one product with 1, so the result is exact; float32 is moved as three bfloat16 parts.

Shapes: B batch, N tokens, M slots, D features, S steps of the staircase.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import vmem

_WIDEST = 4096


def compact(
    values: Float[Array, "B N D"],
    source: Int[Array, "B M"],
    place: Int[Array, "B N"],
    *,
    tile: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B M D"]:
    """Rows of `values` at their places; `tile` rows a step (`block_rows` when None)."""
    return _move(values, place, source.shape[1], True, tile, interpret)


def expand(
    values: Float[Array, "B M D"],
    source: Int[Array, "B M"],
    place: Int[Array, "B N"],
    *,
    tile: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B N D"]:
    """Rows of `values` back at their tokens; `tile` rows a step (`block_rows` when None)."""
    return _move(values, place, source.shape[1], False, tile, interpret)


def block_rows(width: int, itemsize: int) -> int:
    """Rows of a tile: 128, or 256 where 128 rows are too small a copy.

    A step multiplies tile x tile x width for tile x width numbers read and as many written: the product costs `tile`
    multiply-adds a number, which 128 hides behind the copies on every generation and 256 just about. But a copy
    below 256 KiB takes no less time than one of that size (the round trip of 0.35 us on v5e).
    """
    return 128 if 128 * width * itemsize >= 256 * 2**10 else 256


def block_columns(width: int) -> int:
    """Columns of a tile: all, or the most that divide the width into whole lanes below `_WIDEST`."""
    if width <= _WIDEST:
        return width
    return max((lanes for lanes in range(128, _WIDEST + 1, 128) if width % lanes == 0), default=0)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("token", "slot", "live", "fetch", "first"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Staircase:
    """Pairs of tiles to work on; every field is `[B, S]` int32.

    Attributes:
      token, slot: tile of tokens and tile of slots of each step; both never fall, and every tile of either is visited.
      live: 1 where the two tiles share rows.
      fetch: tile to read, the last live one while a step is not live, so that nothing is copied for it.
      first: 1 where a tile is written for the first time.
    """

    token: Int[Array, "B S"]
    slot: Int[Array, "B S"]
    live: Int[Array, "B S"]
    fetch: Int[Array, "B S"]
    first: Int[Array, "B S"]

    @classmethod
    def create(cls, place: Int[Array, "B N"], slots: int, tile: int, *, packs: bool) -> Staircase:
        """The staircase of `place [B, N]` over whole tiles; `packs`: tokens are read and slots written, or the reverse."""
        tokens, slot_tiles = place.shape[1] // tile, -(-slots // tile)
        kept = jnp.sum((place >= 0).reshape(place.shape[0], tokens, tile), axis=-1, dtype=jnp.int32)
        placed = jnp.cumsum(kept, axis=-1)
        # A token tile ends once its last row is placed (the last one never), a slot tile once it is full; a step ends with
        # the nearer of the two ends.
        ends = jnp.arange(tokens - 1) + jnp.maximum(-(-placed[:, :-1] // tile) - 1, 0)
        step = jnp.arange(tokens + slot_tiles - 1, dtype=jnp.int32)
        token = jnp.sum(ends[:, None, :] < step[:, None], axis=-1, dtype=jnp.int32)
        slot = step - token
        above, below = jnp.take_along_axis(placed - kept, token, axis=1), jnp.take_along_axis(placed, token, axis=1)
        live = jnp.maximum(above, slot * tile) < jnp.minimum(below, (slot + 1) * tile)
        read, written = (token, slot) if packs else (slot, token)
        first = jnp.diff(written, axis=-1, prepend=-1) != 0
        fetch = jax.lax.cummax(jnp.where(live, read, 0), axis=1)
        return cls(token, slot, live.astype(jnp.int32), fetch, first.astype(jnp.int32))


def _move(
    values: Array, place: Array, slots: int, packs: bool, tile: int | None, interpret: bool
) -> Float[Array, "B R D"]:
    (batch, rows, width), length = values.shape, place.shape[1]
    columns = _check("compact" if packs else "expand", values)
    tile = min(tile or block_rows(columns, values.dtype.itemsize), max(rows, length, slots))
    place = jnp.pad(place, ((0, 0), (0, -length % tile)), constant_values=-1)
    stairs = Staircase.create(place, slots, tile, packs=packs)
    steps = stairs.token.shape[1]
    _check_tables(stairs)
    written = slots if packs else length

    def read_index(b, c, s, token, slot, live, fetch, first):
        return b, fetch[b * steps + s], c

    def place_index(b, c, s, token, slot, live, fetch, first):
        return b, 0, token[b * steps + s]

    def write_index(b, c, s, token, slot, live, fetch, first):
        return b, (slot if packs else token)[b * steps + s], c

    kernel = functools.partial(_kernel, steps=steps, tile=tile, packs=packs, rows=rows)
    tables = (stairs.token, stairs.slot, stairs.live, stairs.fetch, stairs.first)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, written, width), values.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(batch, width // columns, steps),
            in_specs=[
                pl.BlockSpec((1, 1, tile), place_index),
                pl.BlockSpec((1, min(tile, rows), columns), read_index),
            ],
            out_specs=pl.BlockSpec((1, min(tile, written), columns), write_index),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * steps * tile * tile * width,
            bytes_accessed=batch * (rows + written) * width * values.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="compact" if packs else "expand",
    )(*(table.reshape(-1) for table in tables), place[:, None, :], values)


def _check(operation: str, values: Array) -> int:
    """Columns of a tile.

    Raises:
      NotImplementedError: what the kernel cannot take.
    """
    width = values.shape[2]
    if values.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{operation} moves float32 and bfloat16; got {values.dtype} {values.shape}")
    if width < 128:
        raise NotImplementedError(
            f"{operation} needs rows of at least 128 numbers; got {values.shape}, the nearest is "
            f"{(*values.shape[:2], 128)}"
        )
    columns = block_columns(width)
    if not columns:
        nearest = (*values.shape[:2], -(-width // 128) * 128)
        raise NotImplementedError(
            f"{operation} needs rows of at most {_WIDEST} numbers or of a multiple of 128; got {values.shape}, "
            f"the nearest is {nearest}"
        )
    tile = block_rows(columns, values.dtype.itemsize)
    # Two buffers each for what is read and written, the product in float32, three parts of a float32 tile.
    block, parts = vmem.size((tile, columns), values.dtype), 3 * vmem.size((tile, columns), jnp.bfloat16)
    vmem.check(operation, 4 * block + 2 * vmem.size((tile, columns), jnp.float32) + parts, "use narrower rows")
    return columns


def _check_tables(stairs: Staircase) -> None:
    needed = sum(4 * leaf.size for leaf in jax.tree.leaves(stairs))
    if needed > vmem.SCALAR_BUDGET:
        batch, steps = stairs.token.shape
        most = vmem.SCALAR_BUDGET * batch // needed
        raise NotImplementedError(
            f"the tables of {batch} rows x {steps} steps take {needed} bytes of scalar memory, more than "
            f"{vmem.SCALAR_BUDGET}; the nearest batch that fits is {most}"
        )


def _kernel(
    token_ref, slot_ref, live_ref, fetch_ref, first_ref, place_ref, in_ref, out_ref, *, steps, tile, packs, rows
):
    step = pl.program_id(0) * steps + pl.program_id(2)
    live, first = live_ref[step] == 1, first_ref[step] == 1

    @pl.when(first & ~live)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(live)
    def _():
        slot = slot_ref[step] * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, tile), 0)
        matrix = (slot == place_ref[0]).astype(jnp.float32).astype(jnp.bfloat16)
        # The tile of slots may stand out over the array that holds them.
        read, written = in_ref.shape[1], out_ref.shape[1]
        matrix = matrix[:written, :read] if packs else matrix[:read, :written]
        block = in_ref[0]
        if rows % read:
            # What lies beyond the array may be anything, nan too, and 0 * nan is nan.
            row = fetch_ref[step] * tile + jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
            block = jnp.where(row < rows, block.astype(jnp.float32), 0.0).astype(block.dtype)
        moved = _product(matrix, block, contract=1 if packs else 0)

        @pl.when(first)
        def _():
            out_ref[0] = moved.astype(out_ref.dtype)

        @pl.when(~first)
        def _():
            out_ref[0] = (out_ref[0].astype(jnp.float32) + moved).astype(out_ref.dtype)


def _product(matrix: Array, block: Array, contract: int) -> Array:
    """The 0/1 matrix, contracted along `contract`, times the block: exact, in float32."""
    total = None
    for part in _parts(block):
        dimensions = (((contract,), (0,)), ((), ()))
        product = jax.lax.dot_general(matrix, part, dimensions, preferred_element_type=jnp.float32)
        total = product if total is None else total + product
    return total


def _parts(block: Array) -> list[Array]:
    """Bfloat16 arrays that add up to the block exactly: the upper halves of the bits, thrice, of a float32 number."""
    if block.dtype == jnp.bfloat16:
        return [block]
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(block, jnp.uint32) & jnp.uint32(0xFFFF0000)
        upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(upper.astype(jnp.bfloat16))
        block = block - upper
    return parts
