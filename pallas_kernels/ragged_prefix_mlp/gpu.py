# SPDX-License-Identifier: Apache-2.0
"""The staircase on GPUs, through Triton: two products with the hidden layer between them in memory, both cut to the staircase.

Registers cannot hold tall tiles of both products at once, so they are not fused: a tile of the hidden layer that no row needs
is neither computed nor written, and the second product sums only the hidden numbers that its rows need. Each hidden number has
a limit, the rows that its unit runs on; limits never rise, so what a tile needs is a prefix. Rows past a limit in the last tile
of a unit are masked. The backward pass computes the hidden layer again, by the same products and one more, over rows.

Shapes: R rows, T rows of a tile, D features, K units, U hidden numbers of all units, E outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import guarded
from pallas_kernels.ragged_prefix_mlp.reference import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile of the result, the depth of a turn, warps and stages of a program."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By bytes of a number: the largest square whose sums the compiler for Hopper keeps in half of the registers, so that two
# programs share a processor and one's start and end hide behind the other's products. Exact float32 has no matrix unit.
_TILES = {2: Tiles(128, 128, 64, 8, 3), 4: Tiles(64, 64, 16, 8, 2)}


def ragged_prefix_mlp(
    rows: Float[Array, "R D"],
    counts: Int[Array, " K"],
    up: Float[Array, "D U"],
    bias: Float[Array, " U"],
    down: Float[Array, "U E"],
    *,
    activation: str,
    interpret: bool = False,
) -> Float[Array, "R E"]:
    """The staircase of two products; see `api`.

    Raises:
      NotImplementedError: numbers that are neither of two nor of four bytes, or arrays of different dtypes.
    """
    tiles = _tiles(rows, up, bias, down)
    if not rows.shape[0]:
        return jnp.zeros((0, down.shape[1]), rows.dtype)
    return _mlp((activation, tiles, interpret), rows, _limits(counts, up.shape[1]), up, bias, down)


def ragged_prefix_projection(
    rows: Float[Array, "R U"], counts: Int[Array, " K"], down: Float[Array, "U E"], *, interpret: bool = False
) -> Float[Array, "R E"]:
    """The staircase over one product; see `api`.

    Raises:
      NotImplementedError: numbers that are neither of two nor of four bytes, or arrays of different dtypes.
    """
    tiles = _tiles(rows, down)
    if not rows.shape[0]:
        return jnp.zeros((0, down.shape[1]), rows.dtype)
    return _projection((tiles, interpret), rows, _limits(counts, down.shape[0]), down)


def _tiles(*arrays: Array) -> Tiles:
    dtypes = {jnp.dtype(array.dtype) for array in arrays}
    size = max(dtype.itemsize for dtype in dtypes)
    if len(dtypes) > 1 or size not in _TILES:
        found = ", ".join(sorted(map(str, dtypes)))
        raise NotImplementedError(
            f"the GPU kernels take arrays all of float32, of bfloat16, or of float16; got {found}"
        )
    return _TILES[size]


def _limits(counts: Int[Array, " K"], hidden: int) -> Int[Array, " U"]:
    return jnp.repeat(counts.astype(jnp.int32), hidden // counts.shape[0])


def _live(limits: Int[Array, " U"], rows: int) -> Bool[Array, "R U"]:
    return jnp.arange(rows)[:, None] < limits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(static: tuple, rows: Array, limits: Array, up: Array, bias: Array, down: Array) -> Array:
    activation, tiles, interpret = static
    hidden = _hidden(tiles, interpret, rows, up, limits, bias, activation)
    return _prefix(tiles, interpret, hidden, down, limits, masked=False)


def _mlp_forward(static: tuple, *args: Array) -> tuple[Array, Any]:
    return _mlp(static, *args), args


def _mlp_backward(static: tuple, saved: Any, moved: Array) -> tuple[Any, ...]:
    (activation, tiles, interpret), (rows, limits, up, bias, down) = static, saved
    before = _hidden(tiles, interpret, rows, up, limits, bias, "identity")
    pulled = _hidden(tiles, interpret, moved, down.T, limits, jnp.zeros_like(bias), "identity")
    # Tiles that no row needs were not written, and hold anything.
    live = _live(limits, rows.shape[0])
    hidden, pull = jax.vjp(ACTIVATIONS[activation], jnp.where(live, before, 0).astype(jnp.float32))
    (inner,) = pull(jnp.where(live, pulled, 0).astype(jnp.float32))
    hidden, inner = (jnp.where(live, leaf, 0) for leaf in (hidden, inner))
    dbias = jnp.sum(inner, axis=0).astype(bias.dtype)
    hidden, inner = hidden.astype(rows.dtype), inner.astype(rows.dtype)
    drows = _prefix(tiles, interpret, inner, up.T, limits, masked=False)
    dup = _over_rows(tiles, interpret, inner, _needed(rows, limits), limits, masked=False).T
    ddown = _over_rows(tiles, interpret, hidden, moved, limits, masked=False)
    return drows, np.zeros(limits.shape, jax.dtypes.float0), dup, dbias, ddown


_mlp.defvjp(_mlp_forward, _mlp_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _projection(static: tuple, rows: Array, limits: Array, down: Array) -> Array:
    return _prefix(*static, rows, down, limits, masked=True)


def _projection_forward(static: tuple, *args: Array) -> tuple[Array, Any]:
    return _projection(static, *args), args


def _projection_backward(static: tuple, saved: Any, moved: Array) -> tuple[Any, ...]:
    rows, limits, down = saved
    pulled = _hidden(*static, moved, down.T, limits, jnp.zeros(limits.shape, rows.dtype), "identity")
    drows = jnp.where(_live(limits, rows.shape[0]), pulled, 0)
    ddown = _over_rows(*static, rows, moved, limits, masked=True)
    return drows, np.zeros(limits.shape, jax.dtypes.float0), ddown


_projection.defvjp(_projection_forward, _projection_backward)


def _needed(rows: Array, limits: Array) -> Array:
    """The rows, those that no unit runs on zero: the last tile meets some of them, and nan times 0 is nan."""
    return jnp.where((jnp.arange(rows.shape[0]) < limits[0])[:, None], rows, 0)


def _hidden(
    tiles: Tiles,
    interpret: bool,
    rows: Float[Array, "R D"],
    up: Float[Array, "D U"],
    limits: Int[Array, " U"],
    bias: Float[Array, " U"],
    activation: str,
) -> Float[Array, "R U"]:
    """`act(rows up + bias)`, zeros past the limits; tiles without a row are not written."""
    (length, _), width = rows.shape, up.shape[1]
    rows, up = _widened(rows, 1, tiles.depth), _widened(_widened(up, 0, tiles.depth), 1, tiles.columns)
    args = {
        "rows": rows,
        "up": up,
        "limits": _widened(limits, 0, tiles.columns),
        "bias": _widened(bias, 0, tiles.columns),
    }
    call = _call(
        functools.partial(_hidden_kernel, tiles=tiles, activation=ACTIVATIONS[activation], length=length),
        (length, up.shape[1]),
        rows.dtype,
        tiles,
        interpret,
        "ragged_prefix_hidden",
    )
    return call(args)[:, :width]


def _hidden_kernel(refs: dict[str, Any], out_ref: Any, *, tiles: Tiles, activation: Any, length: int) -> None:
    column, tile = pl.program_id(0) * tiles.columns, pl.program_id(1) * tiles.rows
    columns = pl.ds(column, tiles.columns)
    # 0 or 1: Triton takes no comparison for a bound of a loop.
    needed = jnp.clip(refs["limits"][column] - tile, 0, 1)

    def turn(step: Any, total: Any) -> Any:
        depth = step * tiles.depth
        left = _rows(refs["rows"], tile, tiles.rows, depth, tiles.depth, length)
        return total + _product(left, refs["up"][pl.ds(depth, tiles.depth), columns], 1)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = jax.lax.fori_loop(0, needed * (refs["rows"].shape[1] // tiles.depth), turn, total)
    hidden = activation(total + refs["bias"][columns].astype(jnp.float32)[None, :])
    places = tile + jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 0)
    hidden = jnp.where(places < refs["limits"][columns][None, :], hidden, 0)
    guarded.put(out_ref, hidden.astype(out_ref.dtype), (places < length) & (needed > 0))


def _prefix(
    tiles: Tiles,
    interpret: bool,
    rows: Float[Array, "R U"],
    down: Float[Array, "U E"],
    limits: Int[Array, " U"],
    *,
    masked: bool,
) -> Float[Array, "R E"]:
    """`rows down` over the hidden numbers that each tile of rows needs; with `masked`, rows past a limit count as zero."""
    length, outputs = rows.shape[0], down.shape[1]
    rows, limits = _widened(rows, 1, tiles.depth), _widened(limits, 0, tiles.depth)
    down = _widened(_widened(down, 0, tiles.depth), 1, tiles.columns)
    starts = jnp.arange(pl.cdiv(length, tiles.rows)) * tiles.rows
    args = {
        "rows": rows,
        "down": down,
        "limits": limits,
        "live": jnp.sum(limits > starts[:, None], axis=1, dtype=jnp.int32),
    }
    call = _call(
        functools.partial(_prefix_kernel, tiles=tiles, length=length, masked=masked),
        (length, down.shape[1]),
        rows.dtype,
        tiles,
        interpret,
        "ragged_prefix_product",
    )
    return call(args)[:, :outputs]


def _prefix_kernel(refs: dict[str, Any], out_ref: Any, *, tiles: Tiles, length: int, masked: bool) -> None:
    columns, tile = pl.ds(pl.program_id(0) * tiles.columns, tiles.columns), pl.program_id(1) * tiles.rows

    def turn(step: Any, total: Any) -> Any:
        depth = step * tiles.depth
        left = _rows(refs["rows"], tile, tiles.rows, depth, tiles.depth, length)
        if masked:
            left = _cut(left, tile, refs["limits"][pl.ds(depth, tiles.depth)])
        return total + _product(left, refs["down"][pl.ds(depth, tiles.depth), columns], 1)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(refs["live"][pl.program_id(1)], tiles.depth), turn, total)
    places = tile + jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
    guarded.put(out_ref, total.astype(out_ref.dtype), places < length)


def _over_rows(
    tiles: Tiles,
    interpret: bool,
    hidden: Float[Array, "R U"],
    other: Float[Array, "R E"],
    limits: Int[Array, " U"],
    *,
    masked: bool,
) -> Float[Array, "U E"]:
    """`hidden^T other` over the rows that each tile of hidden numbers has; with `masked`, rows past a limit count as zero."""
    (length, width), outputs = hidden.shape, other.shape[1]
    args = {
        "hidden": _widened(hidden, 1, tiles.rows),
        "other": _widened(other, 1, tiles.columns),
        "limits": _widened(limits, 0, tiles.rows),
    }
    call = _call(
        functools.partial(_over_rows_kernel, tiles=tiles, length=length, masked=masked),
        (args["hidden"].shape[1], args["other"].shape[1]),
        hidden.dtype,
        tiles,
        interpret,
        "ragged_prefix_over_rows",
    )
    return call(args)[:width, :outputs]


def _over_rows_kernel(refs: dict[str, Any], out_ref: Any, *, tiles: Tiles, length: int, masked: bool) -> None:
    column, unit = pl.program_id(0) * tiles.columns, pl.program_id(1) * tiles.rows

    def turn(step: Any, total: Any) -> Any:
        first = step * tiles.depth
        left = _rows(refs["hidden"], first, tiles.depth, unit, tiles.rows, length)
        if masked:
            left = _cut(left, first, refs["limits"][pl.ds(unit, tiles.rows)])
        return total + _product(left, _rows(refs["other"], first, tiles.depth, column, tiles.columns, length), 0)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    turns = pl.cdiv(refs["limits"][unit], tiles.depth)
    out_ref[...] = jax.lax.fori_loop(0, turns, turn, total).astype(out_ref.dtype)


def _call(kernel: Any, shape: tuple[int, int], dtype: Any, tiles: Tiles, interpret: bool, name: str) -> Any:
    """The kernel over tiles of a result; tiles of one row follow each other, so that the left operand stays in the cache."""

    def call(args: dict[str, Array]) -> Array:
        specs = {name: pl.BlockSpec(leaf.shape, lambda *_, rank=leaf.ndim: (0,) * rank) for name, leaf in args.items()}
        return pl.pallas_call(
            kernel,
            grid=(pl.cdiv(shape[1], tiles.columns), pl.cdiv(shape[0], tiles.rows)),
            in_specs=[specs],
            out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda column, row: (row, column)),
            out_shape=jax.ShapeDtypeStruct(shape, dtype),
            compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            interpret=interpret,
            name=name,
        )(args)

    return call


def _rows(ref: Any, first: Any, size: int, column: Any, width: int, length: int) -> Array:
    """A tile of an array of `length` rows; zeros where it ends."""
    tile = ref.at[pl.ds(first, size), pl.ds(column, width)]
    if length % size == 0:
        return tile[...]
    places = first + jax.lax.broadcasted_iota(jnp.int32, (size, width), 0)
    return guarded.take(tile, places < length)


def _cut(tile: Array, first: Any, limits: Array) -> Array:
    """Zero where a row lies past the limit of its column."""
    return jnp.where(first + jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0) < limits[None, :], tile, 0)


def _product(left: Array, right: Array, left_axis: int) -> Array:
    """One matrix product, accumulated in float32; float32 operands are not rounded."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((left_axis,), (0,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=exact, preferred_element_type=jnp.float32)


def _widened(x: Array, axis: int, tile: int) -> Array:
    """Zeros up to a whole tile along an axis; `x` itself where nothing is missing."""
    return jnp.pad(x, [(0, -x.shape[i] % tile if i == axis else 0) for i in range(x.ndim)])
