# SPDX-License-Identifier: Apache-2.0
"""Merging where every odd token heads a slot and those are the last slots, on the TPU: a small part of the product.

Two bfloat16 rows, an even and an odd one, lie in each word of a register, so that they come apart for free. Even rows that keep
a slot of their own go there by products of tiles; in order, none moves further than the number of those that join others, so
that most tiles are empty. Those that join others are gathered by a product of their own and added to the odd rows, whose
places are known, by another one. What rounding adds to weights is taken out of the sums, as in the general kernel.

Shapes: B batch, N tokens, A even tokens, K odd ones, M slots, D features, R even tokens that join an odd one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import vmem

# Columns of features worked at a time; slots of a tile; even tokens that go to odd slots by one product, as gathering the few
# of them first takes longer.
_LANES, _TILE, _SHORT = 256, 128, 256


def takes(values: Array, slots: int, in_order: bool) -> bool:
    """Whether the kernel takes the shape; the general one takes what it does not."""
    return values.dtype == jnp.bfloat16 and values.shape[1] > 1 and _columns(values.shape, slots, in_order) is not None


def _columns(shape: tuple[int, ...], slots: int, in_order: bool) -> int | None:
    """Features a step: the most that fit, as what the tables say is worked out anew for each block of them."""
    _, length, width = shape
    fitting = (
        size
        for size in range(width, 0, -128)
        if width % size == 0 and size % 128 == 0 and _needed(length, slots, size, in_order) <= vmem.BUDGET
    )
    return next(fitting, None)


def _needed(length: int, slots: int, columns: int, in_order: bool) -> int:
    even, odd = -(-length // 2), length // 2
    joining = max(length - slots, 1)
    seen = min(_TILE + joining, even) if in_order else even
    tables = vmem.size((slots - odd, seen), jnp.float32)
    tables += vmem.size((joining, even), jnp.float32) + vmem.size(
        (odd, even if even <= _SHORT else joining), jnp.float32
    )
    blocks = 2 * (vmem.size((length + 16, columns), jnp.bfloat16) + vmem.size((slots, columns), jnp.bfloat16))
    return blocks + 2 * tables + 4 * vmem.size((even, min(columns, _LANES)), jnp.float32)


def merge(
    values: Float[Array, "B N D"],
    assign: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    slots: int,
    in_order: bool,
    interpret: bool = False,
) -> Float[Array, "B M D"]:
    """Weighted sums of the rows that join each slot, a sequence and a block of columns a step."""
    (batch, length, width), even = values.shape, -(-values.shape[1] // 2)
    columns = _columns(values.shape, slots, in_order)
    odd_weight = jnp.pad(weight[:, 1::2], ((0, 0), (0, even - length // 2)))
    joins = assign[:, ::2] >= slots - length // 2
    rank = jnp.where(joins, jnp.cumsum(joins, axis=1), 0) - 1
    facts = [x.astype(jnp.float32) for x in (assign[:, ::2], weight[:, ::2], rank, odd_weight)]
    # Whole words and whole registers: rows past the end are never used.
    rows = -(-length // 16) * 16
    return pl.pallas_call(
        functools.partial(_kernel, length=length, in_order=in_order),
        out_shape=jax.ShapeDtypeStruct((batch, slots, width), values.dtype),
        grid=(batch, width // columns),
        in_specs=[
            pl.BlockSpec((1, len(facts), even), lambda b, c: (b, 0, 0)),
            pl.BlockSpec((1, rows, columns), lambda b, c: (b, 0, c)),
        ],
        out_specs=pl.BlockSpec((1, slots, columns), lambda b, c: (b, 0, c)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem.SCOPE),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * slots * 2 * _TILE * width,
            bytes_accessed=2 * batch * (length + slots) * width,
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="merge_pairs",
    )(jnp.stack(facts, axis=1), values)


class _Part(NamedTuple):
    """Rows of a product: which, of which even tokens, the weights in bfloat16, and a factor that undoes their rounding."""

    rows: slice
    tokens: slice
    matrix: Array
    repair: Array


def _kernel(facts_ref, in_ref, out_ref, *, length, in_order):
    slots, (even, odd) = out_ref.shape[1], (-(-length // 2), length // 2)
    first = slots - odd
    stay = _stay(facts_ref[0, :2], first, even - first if in_order else even)
    join = _join(facts_ref[0, :3], first, odd) if first < even else None
    odd_weight = jnp.broadcast_to(facts_ref[0, 3:], (8, even)).T[:odd, :1]
    for start in range(0, in_ref.shape[2], _LANES):
        lanes = slice(start, min(start + _LANES, in_ref.shape[2]))
        words = pltpu.bitcast(in_ref[0, :, lanes], jnp.uint32)
        evens = pltpu.bitcast(words << 16, jnp.float32)[:even].astype(jnp.bfloat16)
        total = odd_weight * pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32)[:odd]
        for part in stay:
            moved = _dot(part.matrix, evens[part.tokens]) * part.repair
            out_ref[0, part.rows, lanes] = moved.astype(out_ref.dtype)
        if join is not None:
            choice, added = join
            joining = evens if choice is None else _dot(choice, evens).astype(jnp.bfloat16)
            total += _dot(added.matrix, joining) * added.repair
        out_ref[0, first:, lanes] = total.astype(out_ref.dtype)


def _stay(facts: Float[Array, "2 A"], first: int, reach: int) -> list[_Part]:
    """Even tokens that keep a slot, at most `reach` places before their own."""
    even, parts = facts.shape[1], []
    for start in range(0, first, _TILE):
        rows = slice(start, min(start + _TILE, first))
        # A token moves down only.
        tokens = slice(start if reach < even else 0, min(rows.stop + reach, even))
        shape = (rows.stop - rows.start, tokens.stop - tokens.start)
        slot = (start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)
        assign, weight = facts[:1, tokens], facts[1:, tokens]
        parts.append(_Part(rows, tokens, *_rounded(jnp.where(slot == assign, weight, 0.0))))
    return parts


def _join(facts: Float[Array, "3 A"], first: int, odd: int) -> tuple[Float[Array, "R A"] | None, _Part]:
    """Zeros and ones that gather the even tokens that join an odd one, and the weights with which odd rows take these.

    Short sequences gather nothing (None): their odd rows take from all even tokens.
    """
    even = facts.shape[1]
    if even <= _SHORT:
        slot = (first + jax.lax.broadcasted_iota(jnp.int32, (odd, even), 0)).astype(jnp.float32)
        return None, _Part(
            slice(first, first + odd), slice(0, even), *_rounded(jnp.where(slot == facts[:1], facts[1:2], 0.0))
        )
    rows = -(-(even - first) // 16) * 16
    rank = jax.lax.broadcasted_iota(jnp.int32, (rows, even), 0).astype(jnp.float32)
    choice = jnp.where(rank == facts[2:], 1.0, 0.0).astype(jnp.bfloat16)
    # A float32 number is the sum of three bfloat16 ones, and a product with zeros and ones is exact.
    chosen, left = 0.0, jnp.concatenate([facts, jnp.zeros((5, even))], axis=0)
    for _ in range(3):
        piece = left.astype(jnp.bfloat16)
        chosen, left = chosen + _dot(piece, choice, 1), left - piece.astype(jnp.float32)
    slot = (first + jax.lax.broadcasted_iota(jnp.int32, (odd, rows), 0)).astype(jnp.float32)
    matrix = jnp.where(slot == chosen[:1], chosen[1:2], 0.0)
    return choice, _Part(slice(first, first + odd), slice(0, even), *_rounded(matrix))


def _rounded(matrix: Array) -> tuple[Array, Array]:
    rounded = matrix.astype(jnp.bfloat16)
    asked = jnp.sum(jnp.abs(matrix), axis=1, keepdims=True)
    had = jnp.sum(jnp.abs(rounded.astype(jnp.float32)), axis=1, keepdims=True)
    return rounded, asked / jnp.where(had > 0, had, 1.0)


def _dot(left: Array, right: Array, contract: int = 0) -> Array:
    """A product summed in float32 over the last axis of `left` and axis `contract` of `right`."""
    return jax.lax.dot_general(left, right, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32)
