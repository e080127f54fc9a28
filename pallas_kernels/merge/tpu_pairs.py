# SPDX-License-Identifier: Apache-2.0
"""Merging where every odd token heads a slot and those are the last slots, on the TPU: half of the product.

Two bfloat16 rows, an even and an odd one, lie in each word of a register, so that they come apart for free. The even rows go
through the product; each odd row is added to a slot whose place is known. What rounding adds to weights is taken out of the
sums, as in the general kernel.

Shapes: B batch, N tokens, A even tokens, K odd ones, M slots, D features.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import vmem

# Columns of features worked at a time.
_LANES = 256


def takes(values: Array, slots: int) -> bool:
    """Whether the kernel takes the shape; the general one takes what it does not."""
    _, length, width = values.shape
    return (
        values.dtype == jnp.bfloat16
        and width % 128 == 0
        and length > 1
        and _needed(length, slots, width) <= vmem.BUDGET
    )


def _needed(length: int, slots: int, width: int) -> int:
    matrix = vmem.size((slots, -(-length // 2)), jnp.float32)
    blocks = 2 * (vmem.size((length + 16, width), jnp.bfloat16) + vmem.size((slots, width), jnp.bfloat16))
    return blocks + 3 * matrix + 4 * vmem.size((max(length, slots), _LANES), jnp.float32)


def merge(
    values: Float[Array, "B N D"],
    assign: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    slots: int,
    interpret: bool = False,
) -> Float[Array, "B M D"]:
    """Weighted sums of the rows that join each slot, a sequence a step."""
    (batch, length, width), even = values.shape, -(-values.shape[1] // 2)
    odd_weight = jnp.pad(weight[:, 1::2], ((0, 0), (0, even - length // 2)))
    facts = jnp.stack([assign[:, ::2].astype(jnp.float32), weight[:, ::2], odd_weight], axis=1)
    # Whole words and whole registers: rows past the end are never used.
    rows = -(-length // 16) * 16
    return pl.pallas_call(
        functools.partial(_kernel, length=length),
        out_shape=jax.ShapeDtypeStruct((batch, slots, width), values.dtype),
        grid=(batch,),
        in_specs=[
            pl.BlockSpec((1, 3, even), lambda b: (b, 0, 0)),
            pl.BlockSpec((1, rows, width), lambda b: (b, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, slots, width), lambda b: (b, 0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem.SCOPE),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * slots * even * width,
            bytes_accessed=2 * batch * (length + slots) * width,
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="merge_pairs",
    )(facts, values)


def _kernel(facts_ref, in_ref, out_ref, *, length):
    slots, (even, odd) = out_ref.shape[1], (-(-length // 2), length // 2)
    assign, weight = facts_ref[0, :1], facts_ref[0, 1:2]
    odd_weight = jnp.broadcast_to(facts_ref[0, 2:3], (8, even)).T[:odd, :1]
    slot = jax.lax.broadcasted_iota(jnp.int32, (slots, even), 0).astype(jnp.float32)
    matrix = jnp.where(slot == assign, weight, 0.0)
    rounded = matrix.astype(jnp.bfloat16)
    asked = jnp.sum(jnp.abs(matrix), axis=1, keepdims=True)
    had = jnp.sum(jnp.abs(rounded.astype(jnp.float32)), axis=1, keepdims=True)
    repair = asked / jnp.where(had > 0, had, 1.0)
    first = slots - odd
    for start in range(0, in_ref.shape[2], _LANES):
        lanes = slice(start, min(start + _LANES, in_ref.shape[2]))
        words = pltpu.bitcast(in_ref[0, :, lanes], jnp.uint32)
        evens = pltpu.bitcast(words << 16, jnp.float32)[:even].astype(jnp.bfloat16)
        odds = pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32)[:odd]
        total = jax.lax.dot_general(rounded, evens, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        total *= repair
        if first:
            out_ref[0, :first, lanes] = total[:first].astype(out_ref.dtype)
        out_ref[0, first:, lanes] = (total[first:] + odd_weight * odds).astype(out_ref.dtype)
