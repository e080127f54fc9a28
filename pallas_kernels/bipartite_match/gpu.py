# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching for GPUs, through Triton: a running statistic of a tile of left rows over all right rows.

Products are of the rows as they come, exact in float32; norms are summed beside them, so that nothing is normalised or copied
first and nothing of size A x K leaves the registers.

Shapes: B batch, A left rows, K right rows, C channels, S statistics a row, T left rows of a tile, U right rows of a turn.
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
from pallas_kernels.bipartite_match.reference import TINY
from pallas_kernels.block_sparse_attention.gpu_parts import SMALLEST, product

# Right rows of a turn, and left rows of a tile: fewer where there would not be two programs for each of 132 processors.
_TURN, _TALL, _SHORT, _PROGRAMS = 64, 64, 32, 264
_WARPS, _STAGES = 4, 3
# Channels that the registers hold.
_CHANNELS = 256


def bipartite_match(
    left: Float[Array, "B A C"],
    right: Float[Array, "B K C"],
    bias: Float[Array, "B K"],
    *,
    metric: str,
    statistic: str,
    interpret: bool = False,
) -> tuple[Float[Array, "B A S"], Int[Array, "B A S"]]:
    """The statistic, in float32.

    Raises:
      NotImplementedError: more than 256 channels, or rows of different dtypes.
    """
    (batch, rows, channels), columns = left.shape, right.shape[1]
    if channels > _CHANNELS:
        raise NotImplementedError(f"the GPU kernel takes up to {_CHANNELS} channels; got rows {left.shape}")
    if left.dtype != right.dtype:
        raise NotImplementedError(f"the GPU kernel takes rows of one dtype; got {left.dtype} and {right.dtype}")
    tall = _TALL if batch * pl.cdiv(rows, _TALL) >= _PROGRAMS else _SHORT
    wide = max(SMALLEST, pl.next_power_of_2(channels))
    left, right = (jnp.pad(x, ((0, 0), (0, 0), (0, wide - channels))) for x in (left, right))
    kept = 2 if statistic == "best_two" else 1
    out = pl.BlockSpec((None, kept, tall), lambda tile, row: (row, 0, tile))
    value, index = pl.pallas_call(
        functools.partial(_kernel, rows=rows, metric=metric, statistic=statistic),
        grid=(pl.cdiv(rows, tall), batch),
        in_specs=[
            pl.BlockSpec((None, tall, wide), lambda tile, row: (row, tile, 0)),
            pl.BlockSpec((None, columns, wide), lambda tile, row: (row, 0, 0)),
            pl.BlockSpec((None, columns), lambda tile, row: (row, 0)),
        ],
        out_specs=[out, out],
        out_shape=[jax.ShapeDtypeStruct((batch, kept, rows), dtype) for dtype in (jnp.float32, jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="bipartite_match",
    )(left, right, bias)
    return jnp.swapaxes(value, 1, 2), jnp.swapaxes(index, 1, 2)


def _kernel(
    left_ref: Any,
    right_ref: Any,
    bias_ref: Any,
    value_ref: Any,
    index_ref: Any,
    *,
    rows: int,
    metric: str,
    statistic: str,
) -> None:
    tall, wide = left_ref.shape
    columns = right_ref.shape[0]
    place = pl.program_id(0) * tall + jax.lax.broadcasted_iota(jnp.int32, (tall,), 0)
    real = place < rows
    left = guarded.take(left_ref, jnp.broadcast_to(real[:, None], left_ref.shape))
    own = _square(left)

    def turn(step: Any, state: tuple) -> tuple:
        first = step * _TURN
        number = first + jax.lax.broadcasted_iota(jnp.int32, (_TURN,), 0)
        there = number < columns
        window = pl.ds(first, _TURN)
        right = guarded.take(right_ref.at[window, :], jnp.broadcast_to(there[:, None], (_TURN, wide)))
        bias = guarded.take(bias_ref.at[window], there, -jnp.inf)
        scores = product(left, right, 1, 1)
        if metric == "cosine":
            scores *= jax.lax.rsqrt(jnp.maximum(own, TINY))[:, None]
            scores *= jax.lax.rsqrt(jnp.maximum(_square(right), TINY))[None, :]
        if metric == "distance":
            scores = 2 * scores - _square(right)[None, :] - own[:, None]
        return _joined(state, scores + bias[None, :], number[None, :], statistic)

    nothing = jnp.full((tall,), 0.0 if statistic == "sum" else -jnp.inf, jnp.float32), jnp.zeros((tall,), jnp.int32)
    state = jax.lax.fori_loop(0, pl.cdiv(columns, _TURN), turn, (nothing,) * value_ref.shape[0])
    for rank, (value, index) in enumerate(state):
        line = pl.ds(rank, 1), slice(None)
        guarded.put(value_ref.at[line], value[None], real[None])
        guarded.put(index_ref.at[line], jnp.where(value == -jnp.inf, 0, index)[None], real[None])


def _square(rows: Float[Array, "T C"]) -> Float[Array, " T"]:
    rows = rows.astype(jnp.float32)
    return jnp.sum(rows * rows, axis=1)


def _joined(state: tuple, scores: Float[Array, "T U"], number: Int[Array, "1 U"], statistic: str) -> tuple:
    """The statistic with that of one turn. What was found before has the lower numbers and wins ties."""
    if statistic == "sum":
        ((total, index),) = state
        return ((total + jnp.sum(jnp.where(scores == -jnp.inf, 0.0, scores), axis=1), index),)
    best, place = _best(scores, number)
    (first, first_place), *rest = state
    better = best > first
    joined = jnp.where(better, best, first), jnp.where(better, place, first_place)
    if not rest:
        return (joined,)
    # The loser of the first place, against the second of its own side.
    ((second, second_place),) = rest
    next_best, next_place = _best(jnp.where(number == place[:, None], -jnp.inf, scores), number)
    old, old_place = jnp.where(better, first, second), jnp.where(better, first_place, second_place)
    new, new_place = jnp.where(better, next_best, best), jnp.where(better, next_place, place)
    newer = new > old
    return joined, (jnp.where(newer, new, old), jnp.where(newer, new_place, old_place))


def _best(scores: Float[Array, "T U"], number: Int[Array, "1 U"]) -> tuple[Float[Array, " T"], Int[Array, " T"]]:
    """The largest score and the lowest number that has it."""
    best = jnp.max(scores, axis=1)
    among = jnp.where(scores == best[:, None], jnp.broadcast_to(number, scores.shape), jnp.iinfo(jnp.int32).max)
    return best, jnp.min(among, axis=1)
