# SPDX-License-Identifier: Apache-2.0
"""Merging and restoring for GPUs, through Triton: each row of the result is made by one program and written once.

Tokens are sorted by slot, so that a slot's tokens follow each other and are summed in their order: unlike the plain form's
atomic additions, runs repeat bit for bit, and nothing but values, order and result crosses memory.

Shapes: B batch, N tokens, M slots, D features.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import guarded

# Features of a program: 16 bytes for each of 128 threads in bfloat16, twice.
_WIDE, _WARPS = 2048, 4


def merge(
    values: Float[Array, "B N D"],
    assign: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    slots: int,
    odd_last: bool = False,
    in_order: bool = False,
    interpret: bool = False,
) -> Float[Array, "B M D"]:
    """Every slot sums its tokens, in float32 and in their order, so that `odd_last` and `in_order` save nothing."""
    del odd_last, in_order
    # Tokens that join no slot stand behind all others.
    place = jnp.where(assign >= 0, assign, slots)
    order = jnp.argsort(place, axis=1, stable=True).astype(jnp.int32)
    edges = jnp.arange(slots + 1)[:, None]
    starts = jnp.sum(place[:, None] < edges, axis=2, dtype=jnp.int32)
    return _call(_merge_kernel, (order, starts, weight.astype(jnp.float32)), values, slots, interpret, "merge")


def restore(
    values: Float[Array, "B M D"], assign: Int[Array, "B N"], *, interpret: bool = False
) -> Float[Array, "B N D"]:
    """Rows `assign` of `values`; -1 gives zeros."""
    return _call(_restore_kernel, (assign.astype(jnp.int32),), values, assign.shape[1], interpret, "restore")


def _call(kernel: Any, tables: tuple[Array, ...], values: Array, rows: int, interpret: bool, name: str) -> Array:
    """The kernel over rows of the result and pieces of their features; a program sees all tables and rows of its batch row."""
    guarded.addressable(name, {"values": values})
    batch, length, width = values.shape
    wide = min(_WIDE, pl.next_power_of_2(width))
    whole = [pl.BlockSpec((None, table.shape[1]), lambda row, piece, i: (i, 0)) for table in tables]
    return pl.pallas_call(
        functools.partial(kernel, width=width),
        grid=(rows, pl.cdiv(width, wide), batch),
        in_specs=[*whole, pl.BlockSpec((None, length, wide), lambda row, piece, i: (i, 0, piece))],
        out_specs=pl.BlockSpec((None, None, wide), lambda row, piece, i: (i, row, piece)),
        out_shape=jax.ShapeDtypeStruct((batch, rows, width), values.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name=name,
    )(*tables, values)


def _merge_kernel(
    order_ref: Any, starts_ref: Any, weight_ref: Any, values_ref: Any, out_ref: Any, *, width: int
) -> None:
    slot, mask = pl.program_id(0), _mask(out_ref, width)

    def add(step: Any, total: Array) -> Array:
        token = order_ref[step]
        row = guarded.take(values_ref.at[token, :], mask)
        return total + weight_ref[token] * row.astype(jnp.float32)

    zeros = jnp.zeros(out_ref.shape, jnp.float32)
    total = jax.lax.fori_loop(starts_ref[slot], starts_ref[slot + 1], add, zeros)
    guarded.put(out_ref, total.astype(out_ref.dtype), mask)


def _restore_kernel(assign_ref: Any, values_ref: Any, out_ref: Any, *, width: int) -> None:
    slot, mask = assign_ref[pl.program_id(0)], _mask(out_ref, width)
    row = guarded.take(values_ref.at[jnp.maximum(slot, 0), :], mask & (slot >= 0))
    guarded.put(out_ref, row, mask)


def _mask(out_ref: Any, width: int) -> Array:
    """Features that there are."""
    return pl.program_id(1) * out_ref.shape[0] + jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0) < width
