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
from pallas_kernels.ragged_prefix_mlp.sort import permute

# Rows of a tile in a loop over one unit.
_TILE = 128
# Rows of the staircase's tiles, each a divisor of the one before: large ones reuse more of what they read, small ones waste
# less at the end of a level.
_TILES = (256, 64, 32)
# How a tile's rows are gathered and put back: their places are in bounds, and no two are the same.
_EACH_ONCE = {"mode": "promise_in_bounds", "unique_indices": True}


def ragged_prefix_mlp(
    rows: Float[Array, "R D"],
    counts: Int[Array, " K"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str,
    places: tuple[Int[Array, " R"], Int[Array, " R"]] | None = None,
    base: Float[Array, "R E"] | None = None,
) -> Float[Array, "R E"]:
    """Tiles of rows, each with as many units as its first row needs; units that later rows do not need are set to 0.

    Rows in any order are gathered and put back tile by tile, while they are in the cache: no sorted copy is written.
    """
    if not rows.shape[0]:
        return jnp.zeros((0, down.shape[1]), rows.dtype)
    if places is None:
        places = (jnp.arange(rows.shape[0], dtype=jnp.int32),) * 2
    start = jnp.zeros((rows.shape[0], down.shape[1]), rows.dtype) if base is None else base
    return _staircase(activation, base is not None, rows, *places, counts, up, bias, down, start)


def _runs(length: int, counts: Array) -> list[tuple[int, int, Array, Array]]:
    """`(units, tile, first row, number of tiles)` of all that is to do, the rows that need most units first.

    A level of rows that need the same units ends where its last small tile does, so the first rows of the next may be done
    with it. The very first rows, as many as whole tiles leave over, are done with all units: no tile overhangs the last row.
    """
    units, grain = counts.shape[0], min(_TILES[-1], length)
    over = length - (_tiles(length, grain) - 1) * grain
    ends = over + grain * jnp.maximum(_tiles(counts - over, grain), 0)
    runs, start = [(units, over, jnp.int32(0), jnp.int32(1))], jnp.int32(over)
    for unit in reversed(range(units)):
        for tile in _TILES:
            if tile < length:
                number = (ends[unit] - start) // tile
                runs.append((unit + 1, tile, start, number))
                start += number * tile
    return runs


def _split(units: int, up: Array, bias: Array, down: Array) -> list[tuple[Array, Array, Array]]:
    """The weights of each unit by itself; cut once, since a cut in a loop or for each level would copy them every time."""
    cuts = jnp.split(up, units, axis=1), jnp.split(bias, units), jnp.split(down, units)
    return list(zip(*cuts, strict=True))


def _tile_of(activation: str, counts: Array, weights: list, start: Array, tile: Array) -> Array:
    """The output of rows from `start` on, in float32, with the units of `weights` that each of them needs."""
    total = 0.0
    for (up, bias, down), count in zip(weights, counts, strict=False):
        hidden = ACTIVATIONS[activation](_dot(tile, up) + bias.astype(jnp.float32))
        hidden = jnp.where(_live(count, start, tile.shape[0]), hidden, 0)
        total += _dot(hidden.astype(tile.dtype), down)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _staircase(activation, adds, rows, order, inverse, counts, up, bias, down, out):
    """The sum, in the rows of `out` that need a unit: added to what is there with `adds`, else in its place."""
    del inverse
    weights = _split(counts.shape[0], up, bias, down)
    for units, tile, first, number in _runs(rows.shape[0], counts):

        def step(index, out, own=weights[:units], tile=tile, first=first):
            start = first + index * tile
            places = jax.lax.dynamic_slice_in_dim(order, start, tile)
            value = _tile_of(activation, counts, own, start, rows.at[places].get(**_EACH_ONCE))
            if adds:
                value += out.at[places].get(**_EACH_ONCE)
            return out.at[places].set(value.astype(out.dtype), **_EACH_ONCE)

        out = jax.lax.fori_loop(0, number, step, out)
    return out


def _staircase_forward(activation, adds, rows, order, inverse, counts, up, bias, down, out):
    saved = (rows, order, inverse, counts, up, bias, down)
    return _staircase(activation, adds, *saved, out), saved


def _staircase_backward(activation, adds, saved, moved):
    """The same loops over sorted copies, computing each tile again."""
    del adds  # Without it nothing asks for the gradient of the zeros that the sum is put over.
    rows, order, inverse, counts, up, bias, down = saved
    rows, sorted_moved = _needed(permute(rows, order, inverse), counts), permute(moved, order, inverse)
    weights = _split(counts.shape[0], up, bias, down)
    # Sums over tiles stay in float32, whatever the weights' dtype.
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), weights)
    row_grads = jnp.zeros_like(rows)
    for units, tile, first, number in _runs(rows.shape[0], counts):

        def step(index, carry, own=weights[:units], tile=tile, first=first):
            sums, row_grads = carry
            start = first + index * tile
            part, part_moved = (jax.lax.dynamic_slice_in_dim(leaf, start, tile) for leaf in (rows, sorted_moved))
            value, pull = jax.vjp(lambda w, t: _tile_of(activation, counts, w, start, t), own, part)
            grads, row_grad = pull(part_moved.astype(value.dtype))
            sums = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, grads)
            return sums, jax.lax.dynamic_update_slice_in_dim(row_grads, row_grad, start, 0)

        used, row_grads = jax.lax.fori_loop(0, number, step, (sums[:units], row_grads))
        sums = used + sums[units:]
    ups, biases, downs = zip(*sums, strict=True)
    grads = jnp.concatenate(ups, axis=1), jnp.concatenate(biases), jnp.concatenate(downs)
    grads = (grad.astype(leaf.dtype) for grad, leaf in zip(grads, (up, bias, down), strict=True))
    nothing = (np.zeros(leaf.shape, jax.dtypes.float0) for leaf in (order, inverse, counts))
    return permute(row_grads, inverse, order), *nothing, *grads, moved


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


def _tiles(count: Any, tile: int) -> Any:
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
