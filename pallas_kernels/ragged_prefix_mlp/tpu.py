# SPDX-License-Identifier: Apache-2.0
"""The staircase on the TPU: both products fused, tiles of rows that a unit does not reach are skipped.

Each hidden number has a limit, the rows that its unit runs on. A step works on one tile of rows and one block of hidden
numbers; as limits never rise, the blocks with work for a tile come first, and the tiles with work for a block too. Steps
without work copy nothing, as they ask for the block that is there already. Rows past a limit in the last tile of a unit are
masked. The backward pass computes the hidden layer again: once for the rows' gradient, tile by tile, and once for the weights',
block by block.

Shapes: R rows, T rows of a tile, D features, K units, U hidden numbers of all units, N hidden numbers of a block, E outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import vmem
from pallas_kernels.ragged_prefix_mlp.reference import ACTIVATIONS

_ROWS, _HIDDEN = (512, 256, 128), (512, 256, 128)


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
    """The fused staircase; see `api`."""
    _check("ragged_prefix_mlp", rows, up, down)
    limits = jnp.repeat(counts.astype(jnp.int32), up.shape[1] // counts.shape[0])
    return _mlp(activation, interpret, rows, limits, up, bias, down)


def ragged_prefix_projection(
    rows: Float[Array, "R U"], counts: Int[Array, " K"], down: Float[Array, "U E"], *, interpret: bool = False
) -> Float[Array, "R E"]:
    """The staircase over one product; see `api`."""
    _check("ragged_prefix_projection", rows, down)
    limits = jnp.repeat(counts.astype(jnp.int32), rows.shape[1] // counts.shape[0])
    return _projection(interpret, rows, limits, down)


def blocks(operation: str, rows: int, hidden: int, needed: Callable[[int, int], int]) -> tuple[int, int]:
    """Rows of a tile and hidden numbers of a block: the tallest tile that fits, then the widest block.

    Weights are read once for each tile of rows, so a tile of T rows does T multiply-adds for each weight read: 512 rows hide
    that read on every generation but v6e, 256 on v5e and v5p still. Wider blocks only save passes over the float32 sums.

    Args:
      operation: for the message.
      rows, hidden: R and U.
      needed: bytes of on-chip memory for a tile and a block.

    Raises:
      NotImplementedError: U is not divided by a block, or nothing fits.
    """
    if hidden % 128 and hidden > max(_HIDDEN):
        raise NotImplementedError(
            f"{operation} needs a hidden width of at most {max(_HIDDEN)} or a multiple of 128; got {hidden}, "
            f"the nearest is {-(-hidden // 128) * 128}"
        )
    widths = [hidden] if hidden <= 128 or hidden % 128 else [width for width in _HIDDEN if hidden % width == 0]
    pairs = [(min(tile, rows), width) for tile in _ROWS for width in widths]
    for tile, width in pairs:
        if needed(tile, width) <= vmem.BUDGET:
            return tile, width
    vmem.check(operation, needed(*pairs[-1]), "use narrower rows or outputs")
    raise AssertionError("the smallest tile does not fit, which the check refuses")


def _check(operation: str, *arrays: Array) -> None:
    kinds = {array.dtype for array in arrays}
    if len(kinds) > 1 or kinds - {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
        raise NotImplementedError(f"{operation} takes rows and weights all of float32 or all of bfloat16; got {names}")
    if arrays[0].shape[0] == 0:
        raise NotImplementedError(f"{operation} needs at least one row; got {arrays[0].shape}")


def _dot(left: Array, right: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product summed in float32; float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _masked(values: Array, limits: Array, tile: Array) -> Array:
    """`values [T, N]` with zeros in the rows past the limits `[1, N]`."""
    row = tile * values.shape[0] + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where(row < limits, values, 0)


def _real(block_ref, last: Array, tile: Array) -> Array:
    """A tile of rows, those past `last` zero: they may hold anything, and a sum over rows meets them all."""
    block = block_ref[...]
    row = tile * block.shape[0] + jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
    return jnp.where(row < last, block.astype(jnp.float32), 0).astype(block.dtype)


def _launch(kernel, name, interpret, grid, tables, arrays, results, scratch=()):
    """A pallas call; arrays are `(array, block shape, index map)`, results `(shape, dtype, block shape, index map)`."""
    call = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _, _ in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=[pl.BlockSpec(block, index) for _, block, index in arrays],
            out_specs=[pl.BlockSpec(block, index) for _, _, block, index in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem.SCOPE
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=name,
    )
    return call(*tables, *(array for array, _, _ in arrays))


def _needed(blocks: list[tuple[tuple[int, int], object]], scratch: list[tuple[int, int]]) -> int:
    """Bytes of two buffers for each block and one for each float32 scratch array."""
    return sum(2 * vmem.size(*block) for block in blocks) + sum(vmem.size(shape, jnp.float32) for shape in scratch)


def _live_blocks(limits: Array, tile: int, width: int, rows: int) -> Int[Array, " tiles"]:
    """Blocks of hidden numbers with work for each tile of rows."""
    starts = jnp.arange(-(-rows // tile), dtype=jnp.int32) * tile
    return jnp.sum(limits[::width] > starts[:, None], axis=1, dtype=jnp.int32)


def _live_tiles(limits: Array, tile: int, width: int) -> Int[Array, " blocks"]:
    """Tiles of rows with work for each block of hidden numbers."""
    return -(-limits[::width] // tile)


def _clamp(index, live):
    """`index`, or the last live one past them, which asks for nothing new."""
    return jnp.minimum(index, jnp.maximum(live - 1, 0))


# --- Two products --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(activation, interpret, rows, limits, up, bias, down):
    act, (length, depth), (hidden, outputs) = ACTIVATIONS[activation], rows.shape, down.shape
    kind = rows.dtype

    def needed(tile, width):
        shapes = [(tile, depth), (depth, width), (width, outputs), (tile, outputs)]
        # Exact products of float32 keep parts of their operands.
        parts = [(tile, depth), (tile, outputs)] if kind == jnp.float32 else []
        return _needed([(shape, kind) for shape in shapes], [(tile, outputs), (tile, width), (tile, width), *parts])

    tile, width = blocks("ragged_prefix_mlp", length, hidden, needed)

    def kernel(live_ref, limits_ref, bias_ref, rows_ref, up_ref, down_ref, out_ref, sum_ref):
        place, block = pl.program_id(0), pl.program_id(1)

        @pl.when(block == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(block < live_ref[place])
        def _():
            value = act(_dot(rows_ref[...], up_ref[...]) + bias_ref[...])
            value = _masked(value, limits_ref[...], place).astype(kind)
            sum_ref[...] += _dot(value, down_ref[...])

        @pl.when(block == pl.num_programs(1) - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    live = _live_blocks(limits, tile, width, length)
    arrays = [
        (limits[None], (1, width), lambda t, n, live: (0, _clamp(n, live[t]))),
        (bias.astype(jnp.float32)[None], (1, width), lambda t, n, live: (0, _clamp(n, live[t]))),
        (rows, (tile, depth), lambda t, n, live: (t, 0)),
        (up, (depth, width), lambda t, n, live: (0, _clamp(n, live[t]))),
        (down, (width, outputs), lambda t, n, live: (_clamp(n, live[t]), 0)),
    ]
    results = [((length, outputs), kind, (tile, outputs), lambda t, n, live: (t, 0))]
    grid = (live.shape[0], hidden // width)
    return _launch(kernel, "prefix_mlp", interpret, grid, [live], arrays, results, [(tile, outputs)])[0]


def _mlp_forward(activation, interpret, rows, limits, up, bias, down):
    return _mlp(activation, interpret, rows, limits, up, bias, down), (rows, limits, up, bias, down)


def _mlp_backward(activation, interpret, saved, moved):
    _, limits, _, bias, _ = saved
    row_gradient = _mlp_rows(activation, interpret, *saved, moved)
    up_gradient, bias_gradient, down_gradient = _mlp_weights(activation, interpret, *saved, moved)
    bias_gradient = bias_gradient[0].astype(bias.dtype)
    return row_gradient, np.zeros(limits.shape, jax.dtypes.float0), up_gradient, bias_gradient, down_gradient


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _hidden_gradient(act, rows, up, bias, down, moved, limits, place):
    """The hidden layer of a tile and the gradient before its activation, both `[T, N]` in float32 and masked."""
    value, pull = jax.vjp(act, _dot(rows, up) + bias)
    gradient = pull(_dot(moved, down, (1, 1)))[0]
    return _masked(value, limits, place), _masked(gradient, limits, place)


def _mlp_rows(activation, interpret, rows, limits, up, bias, down, moved):
    act, (length, depth), (hidden, outputs) = ACTIVATIONS[activation], rows.shape, down.shape
    kind = rows.dtype

    def needed(tile, width):
        shapes = [(tile, depth), (tile, depth), (depth, width), (width, outputs), (tile, outputs)]
        return _needed([(shape, kind) for shape in shapes], [(tile, depth)] + 3 * [(tile, width)])

    tile, width = blocks("the gradient of ragged_prefix_mlp", length, hidden, needed)

    def kernel(live_ref, limits_ref, bias_ref, rows_ref, moved_ref, up_ref, down_ref, out_ref, sum_ref):
        place, block = pl.program_id(0), pl.program_id(1)

        @pl.when(block == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(block < live_ref[place])
        def _():
            operands = rows_ref[...], up_ref[...], bias_ref[...], down_ref[...], moved_ref[...]
            _, gradient = _hidden_gradient(act, *operands, limits_ref[...], place)
            sum_ref[...] += _dot(gradient.astype(kind), up_ref[...], (1, 1))

        @pl.when(block == pl.num_programs(1) - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    live = _live_blocks(limits, tile, width, length)
    arrays = [
        (limits[None], (1, width), lambda t, n, live: (0, _clamp(n, live[t]))),
        (bias.astype(jnp.float32)[None], (1, width), lambda t, n, live: (0, _clamp(n, live[t]))),
        (rows, (tile, depth), lambda t, n, live: (t, 0)),
        (moved, (tile, outputs), lambda t, n, live: (t, 0)),
        (up, (depth, width), lambda t, n, live: (0, _clamp(n, live[t]))),
        (down, (width, outputs), lambda t, n, live: (_clamp(n, live[t]), 0)),
    ]
    results = [((length, depth), kind, (tile, depth), lambda t, n, live: (t, 0))]
    grid = (live.shape[0], hidden // width)
    return _launch(kernel, "prefix_mlp_rows", interpret, grid, [live], arrays, results, [(tile, depth)])[0]


def _mlp_weights(activation, interpret, rows, limits, up, bias, down, moved):
    act, (length, depth), (hidden, outputs) = ACTIVATIONS[activation], rows.shape, down.shape
    kind = rows.dtype

    def needed(tile, width):
        shapes = [(tile, depth), (tile, outputs)] + 2 * [(depth, width), (width, outputs)]
        # Products of full precision keep the parts of their float32 operands beside them.
        parts = 2 * [(tile, depth), (tile, outputs)] if kind == jnp.float32 else []
        sums = [(depth, width), (width, outputs)] + 4 * [(tile, width)]
        return _needed([(shape, kind) for shape in shapes], sums + parts)

    tile, width = blocks("the gradient of ragged_prefix_mlp", length, hidden, needed)

    def kernel(
        live_ref, limits_ref, bias_ref, rows_ref, moved_ref, up_ref, down_ref, dup_ref, dbias_ref, ddown_ref, *sums
    ):
        block, place = pl.program_id(0), pl.program_id(1)

        @pl.when(place == 0)
        def _():
            for total in sums:
                total[...] = jnp.zeros_like(total)

        @pl.when(place < live_ref[block])
        def _():
            last = jnp.minimum(jnp.max(limits_ref[...]), length)
            own, pushed = _real(rows_ref, last, place), _real(moved_ref, last, place)
            operands = own, up_ref[...], bias_ref[...], down_ref[...], pushed
            value, gradient = _hidden_gradient(act, *operands, limits_ref[...], place)
            sums[0][...] += _dot(own, gradient.astype(kind), (0, 0))
            sums[1][...] += jnp.sum(gradient, axis=0, keepdims=True)
            sums[2][...] += _dot(value.astype(kind), pushed, (0, 0))

        @pl.when(place == pl.num_programs(1) - 1)
        def _():
            for out, total in zip((dup_ref, dbias_ref, ddown_ref), sums, strict=True):
                out[...] = total[...].astype(out.dtype)

    live = _live_tiles(limits, tile, width)
    arrays = [
        (limits[None], (1, width), lambda n, t, live: (0, n)),
        (bias.astype(jnp.float32)[None], (1, width), lambda n, t, live: (0, n)),
        (rows, (tile, depth), lambda n, t, live: (_clamp(t, live[n]), 0)),
        (moved, (tile, outputs), lambda n, t, live: (_clamp(t, live[n]), 0)),
        (up, (depth, width), lambda n, t, live: (0, n)),
        (down, (width, outputs), lambda n, t, live: (n, 0)),
    ]
    results = [
        (up.shape, up.dtype, (depth, width), lambda n, t, live: (0, n)),
        ((1, hidden), jnp.float32, (1, width), lambda n, t, live: (0, n)),
        (down.shape, down.dtype, (width, outputs), lambda n, t, live: (n, 0)),
    ]
    grid, sums = (live.shape[0], -(-length // tile)), [(depth, width), (1, width), (width, outputs)]
    return _launch(kernel, "prefix_mlp_weights", interpret, grid, [live], arrays, results, sums)


# --- One product ---------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _projection(interpret, rows, limits, down):
    length, (hidden, outputs), kind = rows.shape[0], down.shape, rows.dtype

    def needed(tile, width):
        shapes = [(tile, width), (width, outputs), (tile, outputs)]
        return _needed([(shape, kind) for shape in shapes], [(tile, outputs), (tile, width)])

    tile, width = blocks("ragged_prefix_projection", length, hidden, needed)

    def kernel(live_ref, limits_ref, rows_ref, down_ref, out_ref, sum_ref):
        place, block = pl.program_id(0), pl.program_id(1)

        @pl.when(block == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(block < live_ref[place])
        def _():
            value = _masked(rows_ref[...].astype(jnp.float32), limits_ref[...], place).astype(kind)
            sum_ref[...] += _dot(value, down_ref[...])

        @pl.when(block == pl.num_programs(1) - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    live = _live_blocks(limits, tile, width, length)
    arrays = [
        (limits[None], (1, width), lambda t, n, live: (0, _clamp(n, live[t]))),
        (rows, (tile, width), lambda t, n, live: (t, _clamp(n, live[t]))),
        (down, (width, outputs), lambda t, n, live: (_clamp(n, live[t]), 0)),
    ]
    results = [((length, outputs), kind, (tile, outputs), lambda t, n, live: (t, 0))]
    grid = (live.shape[0], hidden // width)
    return _launch(kernel, "prefix_projection", interpret, grid, [live], arrays, results, [(tile, outputs)])[0]


def _projection_forward(interpret, rows, limits, down):
    return _projection(interpret, rows, limits, down), (rows, limits, down)


def _projection_backward(interpret, saved, moved):
    rows, limits, down = saved
    row_gradient = _projection_rows(interpret, limits, down, moved)
    nothing = np.zeros(limits.shape, jax.dtypes.float0)
    return row_gradient, nothing, _projection_weights(interpret, rows, limits, down, moved)


_projection.defvjp(_projection_forward, _projection_backward)


def _projection_rows(interpret, limits, down, moved):
    length, (hidden, outputs), kind = moved.shape[0], down.shape, moved.dtype

    def needed(tile, width):
        shapes = [(tile, width), (width, outputs), (tile, outputs)]
        return _needed([(shape, kind) for shape in shapes], [(tile, width)])

    tile, width = blocks("the gradient of ragged_prefix_projection", length, hidden, needed)

    def kernel(live_ref, limits_ref, moved_ref, down_ref, out_ref):
        place, block = pl.program_id(0), pl.program_id(1)

        @pl.when(block >= live_ref[place])
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        @pl.when(block < live_ref[place])
        def _():
            gradient = _dot(moved_ref[...], down_ref[...], (1, 1))
            out_ref[...] = _masked(gradient, limits_ref[...], place).astype(kind)

    live = _live_blocks(limits, tile, width, length)
    arrays = [
        (limits[None], (1, width), lambda t, n, live: (0, _clamp(n, live[t]))),
        (moved, (tile, outputs), lambda t, n, live: (t, 0)),
        (down, (width, outputs), lambda t, n, live: (_clamp(n, live[t]), 0)),
    ]
    results = [((length, hidden), kind, (tile, width), lambda t, n, live: (t, n))]
    grid = (live.shape[0], hidden // width)
    return _launch(kernel, "prefix_projection_rows", interpret, grid, [live], arrays, results)[0]


def _projection_weights(interpret, rows, limits, down, moved):
    length, (hidden, outputs), kind = rows.shape[0], down.shape, rows.dtype

    def needed(tile, width):
        shapes = [(tile, width), (width, outputs), (tile, outputs)]
        return _needed([(shape, kind) for shape in shapes], [(width, outputs), (tile, width)])

    tile, width = blocks("the gradient of ragged_prefix_projection", length, hidden, needed)

    def kernel(live_ref, limits_ref, rows_ref, moved_ref, out_ref, sum_ref):
        block, place = pl.program_id(0), pl.program_id(1)

        @pl.when(place == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(place < live_ref[block])
        def _():
            last = jnp.minimum(jnp.max(limits_ref[...]), length)
            value = _masked(rows_ref[...].astype(jnp.float32), limits_ref[...], place).astype(kind)
            sum_ref[...] += _dot(value, _real(moved_ref, last, place), (0, 0))

        @pl.when(place == pl.num_programs(1) - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    live = _live_tiles(limits, tile, width)
    arrays = [
        (limits[None], (1, width), lambda n, t, live: (0, n)),
        (rows, (tile, width), lambda n, t, live: (_clamp(t, live[n]), n)),
        (moved, (tile, outputs), lambda n, t, live: (_clamp(t, live[n]), 0)),
    ]
    results = [(down.shape, down.dtype, (width, outputs), lambda n, t, live: (n, 0))]
    grid = (live.shape[0], -(-length // tile))
    return _launch(kernel, "prefix_projection_weights", interpret, grid, [live], arrays, results, [(width, outputs)])[0]
