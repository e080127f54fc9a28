# SPDX-License-Identifier: Apache-2.0
"""The staircase in plain JAX: for each unit a loop over tiles of rows with a trip count known only on the device.

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


def ragged_prefix_mlp(
    rows: Float[Array, "R D"],
    counts: Int[Array, " K"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str,
) -> Float[Array, "R E"]:
    """One prefix loop for each unit, their results added up in float32."""
    units = counts.shape[0]
    up = jnp.moveaxis(up.reshape(up.shape[0], units, -1), 1, 0)

    def unit(params: tuple, tile: Array) -> Array:
        up, bias, down = params
        hidden = ACTIVATIONS[activation](_dot(tile, up) + bias.astype(jnp.float32))
        return _dot(hidden.astype(tile.dtype), down)

    return _sum_of_units(unit, (up, bias.reshape(units, -1), _by_unit(down, units)), _needed(rows, counts), counts)


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


def _sum_of_units(unit: Callable, params: Any, rows: Array, counts: Array) -> Array:
    def add(total: Array, own: Any) -> tuple[Array, None]:
        own_params, count = own
        return total + prefix_loop(unit, own_params, rows, count, tile=_TILE), None

    outputs = jax.eval_shape(unit, jax.tree.map(lambda p: p[0], params), rows[:1]).shape[1]
    total, _ = jax.lax.scan(add, jnp.zeros((rows.shape[0], outputs), jnp.float32), (params, counts))
    return total.astype(rows.dtype)


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
