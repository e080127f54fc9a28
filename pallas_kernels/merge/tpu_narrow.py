# SPDX-License-Identifier: Apache-2.0
"""Merging a few numbers a token on the TPU (mass, coordinates): sums down registers that hold tokens down and slots across.

Rows of a few numbers would fill a matrix unit, and memory, with padding. Here each number of all tokens is a column, compared and
added in float32.

Shapes: B batch, N tokens, M slots, D numbers of a token.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

# Numbers that stand beside the slot in a register's eight rows; tokens whose pairs with slots are all compared.
WIDEST = 7
_LONGEST = 1280
_GROUP = 8
# A block of comparisons fills half of the registers.
_DOWN, _ACROSS = 256, 128


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
    columns = values.astype(jnp.float32) * weight[..., None]
    rows = jnp.concatenate([assign.astype(jnp.float32)[:, None], jnp.swapaxes(columns, 1, 2)], axis=1)
    rows = jnp.pad(rows, ((0, 0), (0, WIDEST - width), (0, 0)))
    group = max(count for count in range(1, _GROUP + 1) if batch % count == 0)
    out = pl.pallas_call(
        functools.partial(_kernel, width=width),
        out_shape=jax.ShapeDtypeStruct((batch, width, slots), jnp.float32),
        grid=(batch // group,),
        in_specs=[pl.BlockSpec((group, 1 + WIDEST, length), lambda b: (b, 0, 0))],
        out_specs=pl.BlockSpec((group, width, slots), lambda b: (b, 0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="merge_narrow",
    )(rows)
    return jnp.swapaxes(out, 1, 2).astype(values.dtype)


def _kernel(rows_ref, out_ref, *, width):
    for one in range(rows_ref.shape[0]):
        columns = rows_ref[one].T
        for first in range(0, out_ref.shape[2], _ACROSS):
            lanes = min(_ACROSS, out_ref.shape[2] - first)
            sums = [jnp.zeros((1, lanes), jnp.float32)] * width
            for start in range(0, columns.shape[0], _DOWN):
                block = columns[start : start + _DOWN]
                slot = first + jax.lax.broadcasted_iota(jnp.int32, (block.shape[0], lanes), 1).astype(jnp.float32)
                joins = block[:, :1] == slot
                added = (jnp.where(joins, block[:, 1 + place : 2 + place], 0.0) for place in range(width))
                sums = [old + jnp.sum(new, axis=0, keepdims=True) for old, new in zip(sums, added, strict=True)]
            for place, total in enumerate(sums):
                out_ref[one, place : place + 1, first : first + lanes] = total
