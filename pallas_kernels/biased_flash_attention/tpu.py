# SPDX-License-Identifier: Apache-2.0
"""Biased attention and its column statistics for TPUs: block sizes, and the pass over columns.

Shapes: B batch, Q queries, K keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.biased_flash_attention.over_blocks import Kernels
from pallas_kernels.block_sparse_attention import tpu as sparse
from pallas_kernels.block_sparse_attention import tpu_backward, tpu_items, tpu_plan
from pallas_kernels.block_sparse_attention import tpu_parts as parts
from pallas_kernels.block_sparse_attention import tpu_positions as positions
from pallas_kernels.block_sparse_attention.index import BlockIndex
from pallas_kernels.block_sparse_attention.tpu_plan import LANES, LOG2E, Plan
from pallas_kernels.block_sparse_attention.tpu_positions import Lookup
from pallas_kernels.position_bias import PositionBias

# Block sizes and the time of a padded row in each, by the compiler's schedules for v5e.
_BLOCKS = {512: 1.0, 384: 1.0, 256: 1.07, 128: 1.12}


def _columns(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    index: BlockIndex,
    key_bias: Float[Array, "B K"] | None,
    lse: Float[Array, "B H Q"],
    query_weight: Float[Array, "B Q"] | None,
    *,
    causal: bool,
    scale: float,
    statistic: str,
    bias: PositionBias | None = None,
    interpret: Any,
) -> Float[Array, "B H K"]:
    """Statistics of the weights given the log-sum-exp of rows in base 2."""
    query = (query.astype(jnp.float32) * (scale * LOG2E)).astype(query.dtype)
    (batch, rows, heads, width), (_, length, groups, _), dtype = query.shape, key.shape, query.dtype
    back = index.transposed()
    plan = tpu_plan.make_plan(back, width)
    lists, counts, _ = tpu_plan.tables(back, plan)
    weight = jnp.ones((batch, rows)) if query_weight is None else query_weight.astype(jnp.float32)

    def blocks(x: Array, fill: float) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.listed_length - rows)), constant_values=fill)
        return x.reshape(*x.shape[:2], plan.blocks, 1, plan.listed)

    args = {
        "lists": lists,
        "counts": counts,
        "key": parts.rows_first(key, dtype),
        "query": parts.rows_first(query, dtype),
        # Queries that fill up the last block have no weights.
        "lse": blocks(lse, jnp.inf),
        "weight": blocks(weight[:, None], 0.0),
    }
    specs = dict(zip(("lists", "counts"), parts.table_specs(back, plan, heads, len(lists)), strict=True))
    head = parts.which(groups, heads)
    specs["key"] = pl.BlockSpec((None, None, plan.step_rows, width), lambda i, j, s: (i, head(j), s, 0))
    specs["query"] = parts.whole(args["query"], heads, plan.listed_length, width)
    specs |= {name: parts.whole(args[name], heads) for name in ("lse", "weight")}
    if key_bias is not None:
        args["bias"] = parts.bias_columns(key_bias, length, plan.own_length, plan.step_rows)
        specs["bias"] = pl.BlockSpec((None, None, plan.step_rows, LANES), lambda i, j, s: (i, s, 0, 0))
    lookup = positions.add(args, specs, bias, plan, own_queries=False)
    scratch = {
        "out": pltpu.VMEM((plan.rows + 1, plan.own, LANES), jnp.float32),
        "logits": [pltpu.VMEM((plan.own // plan.chunk, plan.width, plan.chunk, plan.listed), jnp.float32)] * 2,
    }
    specs, params = parts.fit(specs, args, scratch, plan, "queries", 4 * LANES)
    out = pl.pallas_call(
        functools.partial(_kernel, plan=plan, causal=causal, sizes=(rows, length), statistic=statistic, lookup=lookup),
        grid=(batch, heads, plan.tiles),
        in_specs=[specs],
        out_specs=parts.rows(plan, LANES),
        out_shape=jax.ShapeDtypeStruct((batch, heads, length, LANES), jnp.float32),
        scratch_shapes=[scratch],
        compiler_params=params,
        cost_estimate=parts.cost(args, plan, batch * heads, 2 * width),
        interpret=interpret,
        name="attention_column_stats",
    )(args)
    # Each lane holds the queries of its column in all blocks.
    return (jnp.max if statistic == "max" else jnp.sum)(out, axis=-1)


def _kernel(
    inputs: Any,
    out_ref: Any,
    scratch: Any,
    *,
    plan: Plan,
    causal: bool,
    sizes: tuple[int, int],
    statistic: str,
    lookup: Lookup | None,
) -> None:
    out = scratch["out"]
    items = tpu_items.of(inputs, scratch, plan, causal=causal, sizes=sizes, lookup=lookup, own_queries=False)
    items.clear(("query",), sizes[0])
    out[...] = jnp.zeros(out.shape, jnp.float32)
    join = jnp.maximum if statistic == "max" else jnp.add

    def put(buffer: int, row: Any, start: Any) -> None:
        items.put(buffer, row, start, ("logits", "key", "query"))

    def use(buffer: int, row: Any, start: Any, count: Any, mask: bool) -> None:
        item = items.item(buffer, row, start, count, mask)
        for t in range(items.pieces):
            piece = items.piece(t)
            total = out[row, piece, :]
            for square in items.squares(LANES):
                weights = jnp.exp2(items.logits(item, t, *square) - items.line("lse", item, *square))
                total = join(total, weights * items.line("weight", item, *square))
            out[row, piece, :] = total

    tpu_plan.walk(inputs["counts"], plan, put, use, items.opens)
    for row in range(plan.rows):
        out_ref[pl.ds(row * plan.own, plan.own), :] = out[row]


def _block(length: int) -> int:
    """The size whose padding costs least."""
    return min(_BLOCKS, key=lambda size: -(-length // size) * size * _BLOCKS[size])


KERNELS = Kernels("TPU", sparse.forward, tpu_backward.backward, _columns, _block)
