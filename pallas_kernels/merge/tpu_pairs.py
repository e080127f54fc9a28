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

from pallas_kernels import across, vmem

# Columns of features, and odd rows of them, worked at a time; even tokens of a tile, or its slots where tokens of any place may
# join them; even tokens that go to odd slots by one product, as gathering the few of them first takes longer.
_LANES, _ROWS, _TILE, _SHORT = 256, 128, 128, 256


def takes(values: Array, slots: int, in_order: bool) -> bool:
    """Whether the kernel takes the shape; the general one takes what it does not."""
    return values.dtype == jnp.bfloat16 and values.shape[1] > 1 and _columns(values.shape, slots, in_order) is not None


def sequences(batch: int) -> int:
    """Sequences whose tables are split into even and odd tokens together, a register of them if the batch allows."""
    return max(count for count in range(1, 9) if batch % count == 0)


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
    blocks += 8 * vmem.size((8, length), jnp.float32)
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
    # Whole words and whole registers: what lies past the end is never used.
    tall = -(-length // 16) * 16
    group = sequences(batch)
    facts = pl.BlockSpec((1, group, length), lambda g, b, c: (g, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, in_order=in_order),
        out_shape=jax.ShapeDtypeStruct((batch, slots, width), values.dtype),
        grid=(batch // group, group, width // columns),
        in_specs=[
            facts,
            facts,
            pl.BlockSpec((1, tall, columns), lambda g, b, c: (g * group + b, 0, c)),
        ],
        out_specs=pl.BlockSpec((1, slots, columns), lambda g, b, c: (g * group + b, 0, c)),
        scratch_shapes=[pltpu.VMEM((4, group, across.whole(even)), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem.SCOPE
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * slots * 2 * _TILE * width,
            bytes_accessed=2 * batch * (length + slots) * width,
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="merge_pairs",
    )(*(x.reshape(-1, group, length) for x in (assign, weight)), values)


class _Part(NamedTuple):
    """Rows of a product: which, of which even tokens, the weights in bfloat16, and a factor that undoes their rounding."""

    rows: slice
    tokens: slice
    matrix: Array
    repair: Array


def _kernel(assign_ref, weight_ref, in_ref, out_ref, facts_ref, *, in_order):
    slots, length = out_ref.shape[1], assign_ref.shape[2]
    even, odd = -(-length // 2), length // 2
    first, row = slots - odd, pl.ds(pl.program_id(1), 1)

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        _split(assign_ref, weight_ref, facts_ref, first, even)

    assign, weight, rank = (facts_ref[fact, row][:, :even] for fact in range(3))
    odd_weight = jnp.broadcast_to(facts_ref[3, row], (8, facts_ref.shape[2])).T[:odd, :1]
    stay = _stay(assign, weight, first, even - first if in_order else even)
    join = _join(assign, weight, rank, first, odd) if first < even else None
    for start in range(0, in_ref.shape[2], _LANES):
        lanes = slice(start, min(start + _LANES, in_ref.shape[2]))
        words = pltpu.bitcast(in_ref[0, :, lanes], jnp.uint32)
        evens = pltpu.bitcast(words << 16, jnp.float32)[:even].astype(jnp.bfloat16)
        for part in stay:
            moved = _dot(part.matrix, evens[part.tokens]) * part.repair
            out_ref[0, part.rows, lanes] = moved.astype(out_ref.dtype)
        if join is not None:
            choice, added = join
            joining = evens if choice is None else _dot(choice, evens).astype(jnp.bfloat16)
        # Sums of few rows stay in registers until they are written.
        for top in range(0, odd, _ROWS):
            piece = slice(top, min(top + _ROWS, odd))
            own = pltpu.bitcast(in_ref[0, 2 * piece.start : 2 * piece.stop, lanes], jnp.uint32)
            total = odd_weight[piece] * pltpu.bitcast(own & jnp.uint32(0xFFFF0000), jnp.float32)
            if join is not None:
                total += _dot(added.matrix[piece], joining) * added.repair[piece]
            out_ref[0, first + piece.start : first + piece.stop, lanes] = total.astype(out_ref.dtype)


def _split(assign_ref, weight_ref, facts_ref, first, even):
    """Of several sequences: slots, weights and ranks of even tokens, and weights of odd ones."""
    lanes = facts_ref.shape[2]
    slots, weights = (
        across.halves(across.padded(ref[0].astype(jnp.float32), 2 * lanes)) for ref in (assign_ref, weight_ref)
    )
    joins = (slots[0] >= first) & (across.number(slots[0].shape) < even)
    ranks = jnp.where(joins, across.count_before(jnp.where(joins, 1.0, 0.0)), -1.0)
    for fact, found in enumerate((slots[0], weights[0], ranks, weights[1])):
        facts_ref[fact] = found


def _stay(assign: Float[Array, "1 A"], weight: Float[Array, "1 A"], first: int, reach: int) -> list[_Part]:
    """Even tokens that keep a slot, at most `reach` places before their own."""
    even, parts = assign.shape[1], []
    # A product that is as deep as the matrix unit, over whole registers of bfloat16 rows.
    size = (_TILE - reach) // 16 * 16 if reach <= _TILE // 2 else _TILE
    for start in range(0, first, size):
        rows = slice(start, min(start + size, first))
        # A token moves down only.
        tokens = slice(start if reach < even else 0, min(rows.stop + reach, even))
        shape = (rows.stop - rows.start, tokens.stop - tokens.start)
        slot = (start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)
        matrix = jnp.where(slot == assign[:, tokens], weight[:, tokens], 0.0)
        parts.append(_Part(rows, tokens, *_rounded(matrix)))
    return parts


def _eight(*given: Float[Array, "1 L"]) -> Float[Array, "8 L"]:
    """Rows of one register, zeros after those given."""
    return jnp.concatenate([*given, jnp.zeros((8 - len(given), given[0].shape[1]))], axis=0)


def _join(
    assign: Float[Array, "1 A"], weight: Float[Array, "1 A"], rank: Float[Array, "1 A"], first: int, odd: int
) -> tuple[Float[Array, "R A"] | None, _Part]:
    """Zeros and ones that gather the even tokens that join an odd one, and the weights with which odd rows take these.

    Short sequences gather nothing (None): their odd rows take from all even tokens.
    """
    even = assign.shape[1]
    if even <= _SHORT:
        slot = (first + jax.lax.broadcasted_iota(jnp.int32, (odd, even), 0)).astype(jnp.float32)
        return None, _Part(slice(first, first + odd), slice(0, even), *_rounded(jnp.where(slot == assign, weight, 0.0)))
    rows = -(-(even - first) // 16) * 16
    place = jax.lax.broadcasted_iota(jnp.int32, (rows, even), 0).astype(jnp.float32)
    choice = jnp.where(place == rank, 1.0, 0.0).astype(jnp.bfloat16)
    # A float32 number is the sum of three bfloat16 ones, and a product with zeros and ones is exact.
    chosen, left = 0.0, _eight(assign, weight)
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
