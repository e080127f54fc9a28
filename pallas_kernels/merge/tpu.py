# SPDX-License-Identifier: Apache-2.0
"""Merging and restoring on the TPU: products with a matrix that is made on the fly from `assign`, tile by tile.

A sequence of up to `_WHOLE` tokens is one tile, read once and written once. Longer ones are cut into tiles of tokens and
of slots, and pairs that no token joins are skipped without a copy. Bfloat16 rows meet bfloat16 weights; what rounding adds to
the weights of a slot is taken out of its sum, so that a mean stays a mean. `tpu_narrow` takes rows of a few numbers,
`tpu_pairs` merges of pairs.

Shapes: B batch, N tokens, M slots, D features, T tiles of tokens, S tiles of slots.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import vmem
from pallas_kernels.merge import tpu_narrow, tpu_pairs

# A product of whole sequences wastes multiply-adds on zeros, M of them a number read; longer ones pay for steps of tiles.
_WHOLE, _TILE = 640, 512


def merge(
    values: Float[Array, "B N D"],
    assign: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    slots: int,
    odd_last: bool = False,
    in_order: bool = False,
    tile: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B M D"]:
    """Weighted sums of the rows that join each slot; `tile` rows a step (all of a short sequence when None)."""
    if values.shape[2] <= tpu_narrow.WIDEST:
        return tpu_narrow.merge(values, assign, weight, slots=slots, interpret=interpret)
    if odd_last and tpu_pairs.takes(values, slots, in_order):
        return tpu_pairs.merge(values, assign, weight, slots=slots, in_order=in_order, interpret=interpret)
    return _multiply(values, assign, weight, slots, True, tile, interpret)


def restore(
    values: Float[Array, "B M D"], assign: Int[Array, "B N"], *, tile: int | None = None, interpret: bool = False
) -> Float[Array, "B N D"]:
    """The row of the slot that each token joined."""
    ones = jnp.ones(assign.shape, jnp.float32)
    return _multiply(values, assign, ones, values.shape[1], False, tile, interpret)


def block_columns(operation: str, shape: tuple[int, ...], dtype: jnp.dtype, tile: int) -> int:
    """Columns of a tile: the most that fit on the chip, as the matrix is made anew for each block of columns.

    Raises:
      NotImplementedError: what the kernel cannot take.
    """
    width = shape[2]
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{operation} takes float32 and bfloat16; got {dtype} {shape}")
    if width < 128:
        raise NotImplementedError(
            f"{operation} needs rows of at least 128 numbers; got {shape}, the nearest is {(*shape[:2], 128)}"
        )
    if width % 128 and width > 2048:
        nearest = (*shape[:2], -(-width // 128) * 128)
        raise NotImplementedError(
            f"{operation} needs rows of at most 2048 numbers or of a multiple of 128; got {shape}, the nearest is {nearest}"
        )
    candidates = [width] if width % 128 else [size for size in range(width, 0, -128) if width % size == 0]
    for columns in candidates:
        if _needed(tile, columns, dtype) <= vmem.BUDGET:
            return columns
    vmem.check(operation, _needed(tile, candidates[-1], dtype), "use rows of a multiple of 128 numbers")
    raise AssertionError("the narrowest block does not fit, which the check refuses")


def _needed(tile: int, columns: int, dtype: jnp.dtype) -> int:
    block, matrix = vmem.size((tile, columns), dtype), vmem.size((tile, tile), jnp.float32)
    # Two buffers in and out, the sums, and beside them a product; a float32 product keeps parts of its operands.
    parts = 2 if dtype == jnp.float32 else 1
    sums = (1 + parts) * vmem.size((tile, columns), jnp.float32) + vmem.size((2, tile, 1), jnp.float32)
    return 4 * block + sums + 2 * matrix


def _multiply(
    values: Array, assign: Array, weight: Array, slots: int, merges: bool, tile: int | None, interpret: bool
) -> Float[Array, "B R D"]:
    (batch, rows, width), length = values.shape, assign.shape[1]
    longest = max(length, slots)
    # Tiles of tokens and of slots have one size, a whole number of lanes unless one tile holds all.
    tile = tile or (longest if longest <= _WHOLE else _TILE)
    columns = block_columns("merge" if merges else "restore", values.shape, values.dtype, min(tile, longest))
    assign = jnp.pad(assign, ((0, 0), (0, -length % tile)), constant_values=-1)
    weight = jnp.pad(weight, ((0, 0), (0, -length % tile)))
    # A sequence that is one tile needs no table to say so.
    live = jnp.ones((batch, 1, 1), bool) if tile >= longest else _live(assign, slots, tile)
    if not merges:
        live = jnp.swapaxes(live, 1, 2)
    fetch = jax.lax.cummax(jnp.where(live, jnp.arange(live.shape[2], dtype=jnp.int32), 0), axis=2)
    tables = (live.astype(jnp.int32).reshape(-1), fetch.reshape(-1))
    _check_tables(tables, batch)
    written, outer, inner = (slots if merges else length), *live.shape[1:]

    def cell(b, o, i):
        return (b * outer + o) * inner + i

    def facts_index(b, c, o, i, live, fetch):
        return b, 0, (i if merges else o)

    facts = jnp.stack([assign.astype(jnp.float32), weight], axis=1)
    kernel = functools.partial(_kernel, cell=cell, rows=rows, merges=merges, tile=tile)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, written, width), values.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, width // columns, outer, inner),
            in_specs=[
                pl.BlockSpec((1, 2, tile), facts_index),
                pl.BlockSpec(
                    (1, min(tile, rows), columns), lambda b, c, o, i, live, fetch: (b, fetch[cell(b, o, i)], c)
                ),
            ],
            out_specs=pl.BlockSpec((1, min(tile, written), columns), lambda b, c, o, i, live, fetch: (b, o, c)),
            scratch_shapes=[
                pltpu.VMEM((min(tile, written), columns), jnp.float32),
                pltpu.VMEM((2, min(tile, written), 1), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem.SCOPE
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * length * slots * width,
            bytes_accessed=batch * (rows + written) * width * values.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="merge" if merges else "restore",
    )(*tables, facts, values)


def _live(assign: Array, slots: int, tile: int) -> Array:
    """`[B, S, T]` True where some token of a tile joins a slot of a tile."""
    tiles = assign.reshape(assign.shape[0], -1, tile)
    joined = jnp.where(tiles >= 0, tiles // tile, -1)
    return jnp.any(joined[:, None] == jnp.arange(-(-slots // tile))[:, None, None], axis=-1)


def _check_tables(tables: tuple[Array, ...], batch: int) -> None:
    needed = sum(4 * table.size for table in tables)
    if needed > vmem.SCALAR_BUDGET:
        raise NotImplementedError(
            f"the tables of a batch of {batch} take {needed} bytes of scalar memory, more than {vmem.SCALAR_BUDGET}; the "
            f"nearest batch that fits is {vmem.SCALAR_BUDGET * batch // needed}"
        )


def _kernel(live_ref, fetch_ref, facts_ref, in_ref, out_ref, sum_ref, share_ref, *, cell, rows, merges, tile):
    outer, inner = pl.program_id(2), pl.program_id(3)
    at = cell(pl.program_id(0), outer, inner)

    @pl.when(inner == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        share_ref[...] = jnp.zeros_like(share_ref)

    @pl.when(live_ref[at] == 1)
    def _():
        slot = outer if merges else inner
        slots, tokens = (out_ref, in_ref) if merges else (in_ref, out_ref)
        assign, weight = facts_ref[0, :1], facts_ref[0, 1:]
        shape = (slots.shape[1], assign.shape[1])
        place = (slot * tile + jax.lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)
        matrix = jnp.where(place == assign, weight, 0.0)[:, : tokens.shape[1]]
        block = in_ref[0]
        if rows % block.shape[0]:
            # What lies beyond the array may be anything, nan too, and 0 * nan is nan.
            row = fetch_ref[at] * tile + jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
            block = jnp.where(row < rows, block.astype(jnp.float32), 0.0).astype(block.dtype)
        contract = 1 if merges else 0
        if block.dtype == jnp.float32:
            sum_ref[...] += _product(matrix, block, contract)
            return
        rounded = matrix.astype(jnp.bfloat16)
        sum_ref[...] += _product(rounded, block, contract)
        if merges:
            share_ref[0] += jnp.sum(jnp.abs(matrix), axis=1, keepdims=True)
            share_ref[1] += jnp.sum(jnp.abs(rounded.astype(jnp.float32)), axis=1, keepdims=True)

    @pl.when(inner == pl.num_programs(3) - 1)
    def _():
        total = sum_ref[...]
        if merges and in_ref.dtype == jnp.bfloat16:
            asked, had = share_ref[0], share_ref[1]
            total = total * (asked / jnp.where(had > 0, had, 1.0))
        out_ref[0] = total.astype(out_ref.dtype)


def _product(matrix: Array, block: Array, contract: int) -> Array:
    """The matrix, contracted along `contract`, times the block, in float32."""
    precision = jax.lax.Precision.HIGHEST if block.dtype == jnp.float32 else None
    dimensions = (((contract,), (0,)), ((), ()))
    return jax.lax.dot_general(matrix, block, dimensions, precision=precision, preferred_element_type=jnp.float32)
