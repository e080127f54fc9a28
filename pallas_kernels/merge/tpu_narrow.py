# SPDX-License-Identifier: Apache-2.0
"""Merging a few numbers a token on the TPU (mass, coordinates): tokens lie across the lanes, where they fill registers.

The matrix of zeros and ones is exact in bfloat16, and a float32 number is the sum of three bfloat16 ones, so that one product
with all parts of all numbers is exact but for the order of sums in float32.

Shapes: B batch, N tokens, M slots, D numbers of a token.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

# Numbers that leave room in a register's eight rows; tokens whose pairs with slots are all compared.
WIDEST = 7
_LONGEST = 1280
_GROUP = 8
# Tokens above which they lie down in the matrix.
_DOWN = 256


def merge(
    values: Float[Array, "B N D"],
    assign: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    slots: int,
    interpret: bool = False,
) -> Float[Array, "B M D"]:
    """Weighted sums of the rows that join each slot.

    Raises:
      NotImplementedError: too many tokens.
    """
    batch, length, width = values.shape
    if max(length, slots) > _LONGEST:
        raise NotImplementedError(
            f"merge takes at most {_LONGEST} tokens of fewer than 128 numbers; got {values.shape}, {slots} slots"
        )
    rows = jnp.swapaxes(values.astype(jnp.float32) * weight[..., None], 1, 2)
    group = max(count for count in range(1, _GROUP + 1) if batch % count == 0)
    out = pl.pallas_call(
        functools.partial(_kernel, width=width),
        out_shape=jax.ShapeDtypeStruct((batch, width, slots), jnp.float32),
        grid=(batch // group,),
        in_specs=[
            pl.BlockSpec((1, group, length), lambda b: (b, 0, 0)),
            pl.BlockSpec((group, width, length), lambda b: (b, 0, 0)),
        ],
        out_specs=pl.BlockSpec((group, width, slots), lambda b: (b, 0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="merge_narrow",
    )(assign.reshape(-1, group, length), rows)
    return jnp.swapaxes(out, 1, 2).astype(values.dtype)


def _kernel(assign_ref, rows_ref, out_ref, *, width):
    length, slots = rows_ref.shape[2], out_ref.shape[2]
    # A product takes longer to load a matrix that it must turn, and it takes a while to turn the slots of tokens instead.
    down = length > _DOWN
    shape = (length, slots) if down else (slots, length)
    slot = jax.lax.broadcasted_iota(jnp.int32, shape, int(down)).astype(jnp.float32)
    assign = assign_ref[0].astype(jnp.float32)
    assign = assign.T if down else assign
    for one in range(rows_ref.shape[0]):
        own = assign[:, one : one + 1] if down else assign[one : one + 1]
        joins = jnp.where(slot == own, 1.0, 0.0).astype(jnp.bfloat16)
        # Eight rows of each part, zeros after the numbers.
        parts, left = [], jnp.concatenate([rows_ref[one], jnp.zeros((8 - width, length))], axis=0)
        for _ in range(3):
            parts.append(left.astype(jnp.bfloat16))
            left = left - parts[-1].astype(jnp.float32)
        contract = (((1,), (0 if down else 1,)), ((), ()))
        pieces = jnp.concatenate(parts, axis=0)
        sums = jax.lax.dot_general(pieces, joins, contract, preferred_element_type=jnp.float32)
        total = sums[:8] + (sums[8:16] + sums[16:])
        out_ref[one] = total[:width]
