# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching on the TPU: a running statistic beside the product, as in flash attention.

Similarities of a block are made transposed, right rows down and left rows across, so that the statistic is a maximum down the
block, which is plain vector work, and its results lie across the lanes as they are stored. Rows enter as they are: bfloat16
products are exact, and norms, made here too, enter as factors in float32.

Shapes: B batch, A left rows, K right rows, C channels, S statistics a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import vmem
from pallas_kernels.bipartite_match import reference

# Similarities of a block in float32 are 1 MiB: large enough to hide a step's fixed cost, far below the on-chip memory.
_BLOCK = 512
# Right rows of a product, so that its result stays in registers until the running best has met it.
_ROWS = 128
_NONE = 2**30


def bipartite_match(
    left: Float[Array, "B A C"],
    right: Float[Array, "B K C"],
    bias: Float[Array, "B K"],
    *,
    metric: str,
    statistic: str,
    block: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B A S"], Int[Array, "B A S"]]:
    """The statistic, `block` (`_BLOCK` when None) by `block` similarities at a time."""
    block = block or _BLOCK
    (batch, rows, channels), columns = left.shape, right.shape[1]
    _check(left, right, block)
    # A few more left rows make no block of their own.
    left_block = rows if rows <= block + block // 4 else block
    right_block = min(block, -(-columns // 8) * 8)
    group = _group(batch, max(left_block, right_block), block)
    shared = _shared(batch // group)
    together = group * shared
    kept = 2 if statistic == "best_two" else 1
    # Rows beyond the array are similar to nothing.
    bias = jnp.pad(bias, ((0, 0), (0, -columns % right_block)), constant_values=-jnp.inf)
    grid = (batch // together, pl.cdiv(rows, left_block), shared, pl.cdiv(columns, right_block))
    shape = (kept, batch // together, together, rows)
    kernel = functools.partial(_kernel, columns=columns, metric=metric, statistic=statistic)
    out = pl.BlockSpec((kept, 1, together, left_block), lambda b, i, s, j: (0, b, 0, i))
    value, index = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)],
        grid=grid,
        in_specs=[
            pl.BlockSpec((group, left_block, channels), lambda b, i, s, j: (b * shared + s, i, 0)),
            pl.BlockSpec((group, right_block, channels), lambda b, i, s, j: (b * shared + s, j, 0)),
            pl.BlockSpec((1, together, right_block), lambda b, i, s, j: (b, 0, j)),
        ],
        out_specs=[out, out],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * rows * columns * channels,
            bytes_accessed=left.size * left.dtype.itemsize
            + right.size * right.dtype.itemsize
            + 8 * batch * kept * rows,
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="bipartite_match",
    )(left, right, bias.reshape(-1, together, bias.shape[1]))
    value, index = (jnp.moveaxis(x.reshape(kept, batch, rows), 0, 2) for x in (value, index))
    # One place never gets an index where no similarity is above -inf.
    return value, index if kept == 1 else jnp.where(jnp.isneginf(value), 0, index)


def _group(batch: int, rows: int, block: int) -> int:
    """Sequences a step: short ones together fill a block, as a step of its own for each costs more than its work."""
    return max(count for count in range(1, max(block // rows, 1) + 1) if batch % count == 0)


def _shared(steps: int) -> int:
    """Steps whose facts are rows of one block, a register of them where two cores have a block each."""
    return max(count for count in range(1, 9) if steps % count == 0 and (steps < 2 or count < steps))


def _similarities(
    left: Array, right: Array, bias: Float[Array, "1 K"], metric: str
) -> Callable[[slice], Float[Array, "k A"]]:
    """Similarities of the right rows of a slice, down, with all left rows, across."""
    add = jnp.broadcast_to(bias, (8, bias.shape[1])).T[:, :1]
    if metric == "dot":
        return lambda rows: _product(right[rows], left) + add[rows]
    left_squares, right_squares = (jnp.square(rows.astype(jnp.float32)) for rows in (left, right))
    # The product sums across and turns the sums at once.
    left_square = _product(jnp.ones((8, left.shape[1])), left_squares)[:1]
    right_square = jnp.sum(right_squares, axis=1, keepdims=True)
    if metric == "distance":
        return lambda rows: 2 * _product(right[rows], left) + (add - right_square)[rows] - left_square
    across, down = (jax.lax.rsqrt(jnp.maximum(square, reference.TINY)) for square in (left_square, right_square))
    return lambda rows: _product(right[rows], left) * down[rows] * across + add[rows]


def _check(left: Array, right: Array, block: int) -> None:
    if {left.dtype, right.dtype} not in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.bfloat16)}):
        raise NotImplementedError(
            f"bipartite_match takes rows both of float32 or both of bfloat16; got {left.dtype} {left.shape} and "
            f"{right.dtype} {right.shape}"
        )
    if 0 in left.shape:
        raise NotImplementedError(f"bipartite_match needs at least one left row; got {left.shape}")
    blocks = 4 * vmem.size((block, left.shape[2]), left.dtype)
    # The product, the similarities, their order and a mask beside each other.
    vmem.check(
        "bipartite_match", blocks + 4 * vmem.size((block, block), jnp.float32), "use fewer channels, such as one head's"
    )


def _kernel(left_ref, right_ref, bias_ref, value_ref, index_ref, *, columns, metric, statistic):
    step, part = pl.program_id(2), pl.program_id(3)
    start = part * right_ref.shape[1]

    @pl.when((step == 0) & (part == 0))
    def _():
        value_ref[...] = jnp.full(value_ref.shape, 0.0 if statistic == "sum" else -jnp.inf, jnp.float32)
        index_ref[...] = jnp.zeros(index_ref.shape, jnp.int32)

    for one in range(left_ref.shape[0]):
        row = pl.ds(step * left_ref.shape[0] + one, 1)
        similarities = _similarities(left_ref[one], right_ref[one], bias_ref[0, row], metric)
        if statistic == "best":
            value, index = _running_best(similarities, right_ref.shape[1], left_ref.shape[1])
            # Strictly better, so that the lower index wins ties.
            better = value > value_ref[0, 0, row]
            index_ref[0, 0, row] = jnp.where(better, start + index, index_ref[0, 0, row])
            value_ref[0, 0, row] = jnp.where(better, value, value_ref[0, 0, row])
            continue
        scores = similarities(slice(None))
        place = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        scores = jnp.where(place < columns, scores, -jnp.inf)
        if statistic == "sum":
            finite = jnp.where(scores == -jnp.inf, 0.0, scores)
            value_ref[0, 0, row] += jnp.sum(finite, axis=0, keepdims=True)
            continue
        value, index = _best(scores, place)
        second, second_index = _best(jnp.where(place == index, -jnp.inf, scores), place)
        found = _best_two(
            [(value_ref[kept, 0, row], index_ref[kept, 0, row]) for kept in range(2)],
            [(value, index), (second, second_index)],
        )
        for kept, (value, index) in enumerate(found):
            value_ref[kept, 0, row], index_ref[kept, 0, row] = value, index


def _best_two(old: list[tuple[Array, Array]], new: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """The first two of both, value and index; the older ones have lower indices."""
    better = new[0][0] > old[0][0]
    first, rival, mate = (
        tuple(jnp.where(better, one, other) for one, other in zip(*pair, strict=True))
        # The loser of the first places stands against the second of the winner's side.
        for pair in ((new[0], old[0]), (old[0], new[0]), (new[1], old[1]))
    )
    # Of equals the older has the lower index: the rival where the new value is first, else the mate.
    mated = (mate[0] > rival[0]) | ((mate[0] == rival[0]) & ~better)
    return [first, tuple(jnp.where(mated, one, other) for one, other in zip(mate, rival, strict=True))]


def _running_best(similarities: Callable[[slice], Array], rows: int, lanes: int) -> tuple[Array, Array]:
    """The largest of each column and the first place where it stands, eight rows of registers beside each other."""
    value = jnp.full((8, lanes), -jnp.inf, jnp.float32)
    first = jnp.zeros((8, lanes), jnp.int32)
    for start in range(0, rows, _ROWS):
        scores = similarities(slice(start, min(start + _ROWS, rows)))
        for row in range(0, scores.shape[0], 8):
            # False for nan.
            better = scores[row : row + 8] > value
            value = jnp.where(better, scores[row : row + 8], value)
            first = jnp.where(better, start + row, first)
    return _best(value, first + jax.lax.broadcasted_iota(jnp.int32, first.shape, 0))


def _best(scores: Array, place: Array) -> tuple[Array, Array]:
    """The largest of each column and the first place where it stands."""
    value = jnp.max(scores, axis=0, keepdims=True)
    return value, jnp.min(jnp.where(scores == value, place, _NONE), axis=0, keepdims=True)


def _product(right: Array, left: Array) -> Array:
    """`right left.T` in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(right, left, dimensions, precision=precision, preferred_element_type=jnp.float32)
