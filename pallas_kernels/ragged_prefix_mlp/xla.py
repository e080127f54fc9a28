# SPDX-License-Identifier: Apache-2.0
"""The staircase in plain JAX: loops over tiles of rows with trip counts known only on the device.

Shapes: R rows, T rows of a tile, D features, K units, U hidden numbers of all units, E outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.ragged_prefix_mlp.reference import ACTIVATIONS

# Few enough rows that little is wasted at the end of a prefix, enough to reuse the weights that a tile reads.
_TILE = 128
# A tile runs the units of the row that needs most, so the MLP wants smaller ones.
_MLP_TILE = 128


def ragged_prefix_mlp(
    rows: Float[Array, "R D"],
    counts: Int[Array, " K"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str,
) -> Float[Array, "R E"]:
    """Tiles of rows, each with as many units as its first row needs; units that other rows do not need are set to 0."""
    length = rows.shape[0]
    tile = max(min(_MLP_TILE, length), 1)
    padded = jnp.pad(_needed(rows, counts), ((0, max(-length % tile, tile - length)), (0, 0)))
    return _staircase(activation, tile, padded, counts, up, bias, down)[:length]


def _levels(counts: Array, tile: int) -> Any:
    """`(units, first tile, tile behind the last)` for each number of units that a tile can need, the largest first."""
    # A tile at row i needs as many units as there are counts above i.
    units = counts.shape[0]
    ends = [(counts[unit] + tile - 1) // tile for unit in reversed(range(units))]
    firsts = [jnp.zeros_like(ends[0]), *ends[:-1]]
    return list(zip(range(units, 0, -1), firsts, ends, strict=True))


def _tile_of(activation: str, limits: Array, params: tuple, start: Array, tile: Array) -> Array:
    """The output of a tile of rows with the units of `params`; row `start + i` runs hidden numbers whose limit is above it."""
    up, bias, down = params
    hidden = ACTIVATIONS[activation](_dot(tile, up) + bias.astype(jnp.float32))
    live = (start + jnp.arange(tile.shape[0]))[:, None] < limits[None]
    return _dot(jnp.where(live, hidden, 0).astype(tile.dtype), down)


def _cut(units: int, counts: Array, up: Array, bias: Array, down: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """Limits and weights of the first units."""
    width = up.shape[1] // counts.shape[0]
    used = units * width
    return jnp.repeat(counts[:units], width), (up[:, :used], bias[:used], down[:used])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _staircase(activation, tile, rows, counts, up, bias, down):
    out = jnp.zeros((rows.shape[0], down.shape[1]), rows.dtype)
    for units, first, end in _levels(counts, tile):
        limits, params = _cut(units, counts, up, bias, down)

        def step(index, out, limits=limits, params=params):
            start = index * tile
            value = _tile_of(activation, limits, params, start, jax.lax.dynamic_slice_in_dim(rows, start, tile))
            return jax.lax.dynamic_update_slice_in_dim(out, value.astype(out.dtype), start, 0)

        out = jax.lax.fori_loop(first, end, step, out)
    return out


def _staircase_forward(activation, tile, rows, counts, up, bias, down):
    return _staircase(activation, tile, rows, counts, up, bias, down), (rows, counts, up, bias, down)


def _staircase_backward(activation, tile, saved, moved):
    """The same loops, computing each tile again; sums over tiles stay in float32, whatever the weights' dtype."""
    rows, counts, *weights = saved
    row_grads = jnp.zeros_like(rows)
    totals = [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in weights]
    for units, first, end in _levels(counts, tile):
        limits, params = _cut(units, counts, *weights)

        def step(index, carry, limits=limits, params=params):
            sums, row_grads = carry
            start = index * tile
            part = jax.lax.dynamic_slice_in_dim(rows, start, tile)
            value, pull = jax.vjp(lambda p, t: _tile_of(activation, limits, p, start, t), params, part)
            tile_moved = jax.lax.dynamic_slice_in_dim(moved, start, tile)
            grads, row_grad = pull(tile_moved.astype(value.dtype))
            sums = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, grads)
            return sums, jax.lax.dynamic_update_slice_in_dim(row_grads, row_grad, start, 0)

        zeros = tuple(jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in params)
        sums, row_grads = jax.lax.fori_loop(first, end, step, (zeros, row_grads))
        used = params[1].shape[0]
        totals = [total.at[slices].add(own) for total, slices, own in zip(
            totals, (np.s_[:, :used], np.s_[:used], np.s_[:used]), sums, strict=True
        )]
    up, bias, down = (total.astype(leaf.dtype) for total, leaf in zip(totals, weights, strict=True))
    return row_grads, np.zeros(counts.shape, jax.dtypes.float0), up, bias, down


_staircase.defvjp(_staircase_forward, _staircase_backward)


def ragged_prefix_projection(
    rows: Float[Array, "R U"], counts: Int[Array, " K"], down: Float[Array, "U E"]
) -> Float[Array, "R E"]:
    """One prefix loop for each unit over its own columns of the rows."""
    units = counts.shape[0]
    total = jnp.zeros((rows.shape[0], down.shape[1]), jnp.float32)
    columns = jnp.split(_needed(rows, counts), units, axis=1)
    for unit, (own, weight) in enumerate(zip(columns, _by_unit(down, units), strict=True)):
        total += prefix_loop(lambda w, tile: _dot(tile, w), weight, own, counts[unit], tile=_TILE)
    return total.astype(rows.dtype)


def _needed(rows: Array, counts: Array) -> Array:
    """The rows, those that no unit runs on zero: the last tile meets some of them, and nan times 0 is nan."""
    return jnp.where((jnp.arange(rows.shape[0]) < counts[0])[:, None], rows, 0)


def _by_unit(down: Array, units: int) -> Array:
    return down.reshape(units, -1, down.shape[1])


def _dot(left: Array, right: Array) -> Array:
    # A TPU would multiply float32 in bfloat16.
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.dot(left, right, precision=precision, preferred_element_type=jnp.float32)


def prefix_loop(
    unit: Callable[[Any, Float[Array, "T D"]], Float[Array, "T E"]],
    params: Any,
    rows: Float[Array, "R D"],
    count: Int[Array, ""],
    *,
    tile: int,
) -> Float[Array, "R E"]:
    """`unit(params, rows)` on the first `count` rows, zeros below; work grows with `count`, in steps of `tile` rows.

    The backward pass runs the same loop, computing each tile again, so nothing but the inputs is kept.
    """
    length = rows.shape[0]
    tile = max(min(tile, length), 1)
    # Whole tiles, and one even without rows: a slice cannot be longer than what it is cut from.
    padded = jnp.pad(rows, ((0, max(-length % tile, tile - length)), (0, 0)))
    return _prefix_loop(unit, tile, params, padded, jnp.asarray(count, jnp.int32))[:length]


def _tiles(count: Array, tile: int) -> Array:
    return (count + tile - 1) // tile


def _live(count: Array, start: Array, tile: int) -> Array:
    """`[T, 1]` True for rows of the tile at `start` that lie below `count`."""
    return (start + jnp.arange(tile) < count)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _prefix_loop(unit, tile, params, rows, count):
    shape = jax.eval_shape(unit, params, jax.ShapeDtypeStruct((tile, rows.shape[1]), rows.dtype))

    def step(index, out):
        start = index * tile
        value = unit(params, jax.lax.dynamic_slice_in_dim(rows, start, tile))
        value = jnp.where(_live(count, start, tile), value, 0)
        return jax.lax.dynamic_update_slice_in_dim(out, value, start, 0)

    return jax.lax.fori_loop(0, _tiles(count, tile), step, jnp.zeros((rows.shape[0], shape.shape[1]), shape.dtype))


def _prefix_loop_forward(unit, tile, params, rows, count):
    return _prefix_loop(unit, tile, params, rows, count), (params, rows, count)


def _prefix_loop_backward(unit, tile, saved, moved):
    params, rows, count = saved

    def step(index, carry):
        param_grads, row_grads = carry
        start = index * tile
        _, pull = jax.vjp(unit, params, jax.lax.dynamic_slice_in_dim(rows, start, tile))
        tile_moved = jax.lax.dynamic_slice_in_dim(moved, start, tile)
        param_grad, row_grad = pull(jnp.where(_live(count, start, tile), tile_moved, 0))
        # Sums over tiles stay in float32, whatever the parameters' dtype.
        param_grads = jax.tree.map(lambda total, g: total + g.astype(total.dtype), param_grads, param_grad)
        return param_grads, jax.lax.dynamic_update_slice_in_dim(row_grads, row_grad, start, 0)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    param_grads, row_grads = jax.lax.fori_loop(0, _tiles(count, tile), step, (zeros, jnp.zeros_like(rows)))
    param_grads = jax.tree.map(lambda g, p: g.astype(p.dtype), param_grads, params)
    return param_grads, row_grads, np.zeros((), jax.dtypes.float0)


_prefix_loop.defvjp(_prefix_loop_forward, _prefix_loop_backward)
