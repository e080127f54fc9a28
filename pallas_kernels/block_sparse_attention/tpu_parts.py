# SPDX-License-Identifier: Apache-2.0
"""Pieces of the TPU kernels: products, masks, layouts of arguments, and what a kernel asks of the compiler.

Shapes: B batch, N rows, M rows with padding, L keys, H heads, C blocks, q rows of a block, c columns of a square, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import tpu_plan
from pallas_kernels.block_sparse_attention.index import BlockIndex
from pallas_kernels.block_sparse_attention.tpu_plan import LANES, LOG2E, Plan


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """One matrix product, accumulated in float32; float32 operands are not rounded."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=exact, preferred_element_type=jnp.float32)


def numbers(table: Any, plan: Plan, row: Any, start: Any) -> list[Any]:
    """Entries of a list for the blocks of an item; the spare list reads some other one."""
    first = jnp.minimum(row, plan.rows - 1) * plan.capacity + start
    return [table[0, first + w] for w in range(plan.width)]


def limits(plan: Plan, seen: list[Any], start: Any, count: Any, causal: bool) -> list[Any]:
    """For each block of an item, `seen`, the most that a key's row may be ahead of a query's column; `ALWAYS` if it is idle."""
    seen = seen if causal else [tpu_plan.NEVER] * plan.width
    return [jnp.where(start + w < count, limit, tpu_plan.ALWAYS) for w, limit in enumerate(seen)]


def masked(logits: Float[Array, "q c"], limit: Any) -> Float[Array, "q c"]:
    """-inf where the key's row is after the query's column plus `limit`; logits are keys x queries."""
    late = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) - jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(late <= limit, logits, -jnp.inf)


def wide(columns: Float[Array, "q 128"], size: int) -> Float[Array, "q c"]:
    """Copies of one column, `size` of them."""
    return columns if size == LANES else jnp.concatenate([columns] * (size // LANES), axis=1)


def rows_first(x: Float[Array, "B N H d"], dtype: Any) -> Float[Array, "B H N d"]:
    """Heads before rows. Blocks may reach past the last row, where they hold nothing that means anything."""
    return jnp.swapaxes(x.astype(dtype), 1, 2)


def columns_first(x: Float[Array, "B N H d"], dtype: Any) -> Float[Array, "B H d N"]:
    """Heads before numbers before rows."""
    return jnp.transpose(x.astype(dtype), (0, 2, 3, 1))


def clear(inputs: Any, names: tuple[str, ...], first: int, rows: int, *, by_columns: tuple[str, ...] = ()) -> None:
    """Zeros in arrays of `rows` rows, or columns, from row `first` on, so that a weight of 0 there adds 0."""
    start = first // LANES * LANES
    if first == rows:
        return
    for name in (*names, *by_columns):
        axis = 1 if name in by_columns else 0
        place = (slice(None), pl.ds(start, rows - start))[:: 1 if axis else -1]
        last = inputs[name][place]
        real = start + jax.lax.broadcasted_iota(jnp.int32, last.shape, axis) < first
        # Narrow numbers have no selection on every chip.
        inputs[name][place] = jnp.where(real, last.astype(jnp.float32), 0.0).astype(last.dtype)


def span(plan: Plan, number: Any, start: int = 0, size: int | None = None) -> Any:
    """Rows of a listed block, or `size` of them from `start` on."""
    return pl.ds(pl.multiple_of(number * plan.listed + start, LANES), plan.listed if size is None else size)


def bias_columns(
    key_bias: Float[Array, "B L"] | None, keys: int, length: int, block: int
) -> Float[Array, "b C q 128"] | None:
    """The bias in base 2 as columns, each as wide as a register, -inf for keys that fill up the last block; None for none."""
    if key_bias is None and length == keys:
        return None
    bias = jnp.zeros((1, keys)) if key_bias is None else key_bias.astype(jnp.float32) * LOG2E
    bias = jnp.pad(bias, ((0, 0), (0, length - keys)), constant_values=-jnp.inf)
    bias = bias.reshape(bias.shape[0], -1, block, 1)
    return jnp.broadcast_to(bias, (*bias.shape[:3], LANES))


def add_masks(args: dict[str, Any], specs: dict[str, Any], bias: Array | None, bank: Array | None) -> None:
    """Adds to a kernel's arguments what there is of the bias of listed keys and the tiles of lists."""
    if bias is not None:
        one = bias.shape[0] == 1
        args["bias"] = bias
        specs["bias"] = pl.BlockSpec((None, *bias.shape[1:]), lambda i, j, s: (0 if one else i, 0, 0, 0))
    if bank is not None:
        args["bank"] = bank
        specs["bank"] = pl.BlockSpec(bank.shape, lambda i, j, s: (0, 0, 0))


def cost(args: Any, plan: Plan, heads: int, flops: int) -> pl.CostEstimate:
    """What the kernel costs when every list is full, with `flops` for each pair of rows."""
    pairs = heads * plan.own_length * plan.capacity * plan.listed
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args))
    return pl.CostEstimate(flops=flops * pairs, transcendentals=pairs, bytes_accessed=moved)


def table_specs(index: BlockIndex, plan: Plan, heads: int, lists: int) -> tuple[list[pl.BlockSpec], pl.BlockSpec]:
    """Where a grid step (batch row, head, tile) finds its `lists` lists and its counts, in scalar memory."""
    b, h = index.indices.shape[:2]
    head = which(h, heads)

    def spec(size: int) -> pl.BlockSpec:
        place = lambda i, j, s: (i if b > 1 else 0, head(j), s, 0, 0)  # noqa: E731
        return pl.BlockSpec((None, None, None, 1, size), place, memory_space=pltpu.SMEM)

    return [spec(plan.rows * plan.capacity)] * lists, spec(plan.rows + 2)


def whole(x: Array, heads: int, *block: int) -> pl.BlockSpec:
    """All of a head of `x [B, heads of x, ...]`, as a `block` where that is larger, in VMEM.

    Copied once for all steps in a row that share it.
    """
    head, rest = which(x.shape[1], heads), (0,) * (x.ndim - 2)
    return pl.BlockSpec((None, None, *(block or x.shape[2:])), lambda i, j, s: (i, head(j), *rest))


def rows(plan: Plan, width: int) -> pl.BlockSpec:
    """The own rows `[B, H, M, width]` of a grid step."""
    return pl.BlockSpec((None, None, plan.step_rows, width), lambda i, j, s: (i, j, s, 0))


def columns(plan: Plan, width: int) -> pl.BlockSpec:
    """The own columns `[B, H, width, M]` of a grid step."""
    return pl.BlockSpec((None, None, width, plan.step_rows), lambda i, j, s: (i, j, 0, s))


def which(size: int, heads: int) -> Callable[[Any], Any]:
    """Maps a head to its row among `size` rows that heads share in order (1, the key heads, or all)."""
    return lambda head: head // (heads // size)


# Arrays of the listed side by its name.
_LISTED = {
    "keys": {"key", "key_columns", "value", "value_columns", "bias", "key_positions"},
    "queries": {"query", "dout", "lse", "delta", "weight", "query_positions"},
}


def fits(specs: dict[str, Any], args: Any, scratch: Any, plan: Plan, listed: str, written: int) -> bool:
    """Whether `fit` refuses nothing."""
    per_row, fixed, _ = _demand(specs, args, scratch, plan, listed, written)
    return tpu_plan.fits(per_row, plan.listed_length, fixed)


def _demand(
    specs: dict[str, Any], args: Any, scratch: Any, plan: Plan, listed: str, written: int
) -> tuple[int, int, list[str]]:
    """Bytes of VMEM for each listed row, bytes for the rest, and the names of what lies there whole."""
    memory = [leaf for leaf in jax.tree.leaves(scratch) if leaf.memory_space == pltpu.VMEM]
    fixed = sum(tpu_plan.vmem_bytes(leaf.shape, leaf.dtype) for leaf in memory)
    # Whatever the grid moves a step at a time has two buffers.
    fixed += 2 * plan.step_rows * written
    per_row, resident = 0, []
    for name, spec in specs.items():
        if not isinstance(spec, pl.BlockSpec) or spec.memory_space is not None:
            continue
        block = [size for size in spec.block_shape if size is not None]
        size = tpu_plan.vmem_bytes(block, args[name].dtype)
        if name in _LISTED[listed]:
            resident.append(name)
            per_row += size // plan.listed_length
        else:
            fixed += 2 * size
    return per_row, fixed, resident


def fit(
    specs: dict[str, Any], args: Any, scratch: Any, plan: Plan, listed: str, written: int
) -> tuple[dict[str, Any], Any]:
    """The specs as they fit in VMEM, and what to ask of the compiler.

    The `listed` rows of the next head are fetched while this one is worked, or only at its turn where two do not fit. Heads and
    batch rows may go to different cores; tiles of one head share its listed rows. A step writes `written` bytes an own row.

    Raises:
      NotImplementedError: blocks and scratch do not fit.
    """
    per_row, fixed, resident = _demand(specs, args, scratch, plan, listed, written)
    buffers, limit = tpu_plan.vmem_limit(per_row, plan.listed_length, fixed, listed)
    if buffers == 1:
        once = {
            n: pl.BlockSpec(specs[n].block_shape, specs[n].index_map, pipeline_mode=pl.Buffered(1)) for n in resident
        }
        specs = specs | once
    # Block numbers come from lists whose builders keep them in range.
    return specs, pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit, disable_bounds_checks=True
    )
