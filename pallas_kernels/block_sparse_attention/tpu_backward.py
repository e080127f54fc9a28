# SPDX-License-Identifier: Apache-2.0
"""Backward pass of block-sparse attention for TPUs: a kernel over the lists of queries, one over the transposed lists of keys.

Both hold logits as keys x queries, where log-sum-exp and delta of a query are a row, and compute weights again. The kernel of
queries keeps keys and values of a head in VMEM and sums the gradient of a query block; the kernel of keys keeps queries and
output gradients and sums those of a key block. No sum crosses grid steps, so nothing depends on their order.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import tpu_items, tpu_plan, tpu_stream
from pallas_kernels.block_sparse_attention import tpu_parts as parts
from pallas_kernels.block_sparse_attention import tpu_positions as positions
from pallas_kernels.block_sparse_attention.index import BlockIndex
from pallas_kernels.block_sparse_attention.tpu_plan import LANES, LN2, LOG2E, Plan
from pallas_kernels.block_sparse_attention.tpu_positions import Lookup
from pallas_kernels.position_bias import PositionBias


def backward(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    value: Float[Array, "B L G d"],
    index: BlockIndex,
    key_bias: Float[Array, "B L"] | None,
    sinks: Float[Array, " H"] | None,
    lse: Float[Array, "B H N"],
    delta: Float[Array, "B H N"],
    dout: Float[Array, "B N H d"],
    *,
    causal: bool,
    scale: float,
    bias: PositionBias | None = None,
    interpret: Any = False,
) -> tuple[Array | None, ...]:
    """Gradients of query, key, value, key_bias and, with a `bias`, of its table; products in the dtype of `query`.

    Raises:
      NotImplementedError: blocks that are not multiples of 128, or positions of more rows than fit in VMEM.
    """
    options = dict(causal=causal, interpret=interpret, bias=bias)
    scaled = (query.astype(jnp.float32) * (scale * LOG2E)).astype(query.dtype)
    args = (scaled, key, value, index, key_bias, lse * LOG2E, delta, dout)
    dquery, *dtable = _query_gradient(*args, **options)
    dquery = dquery * scale
    dkey, dvalue, dbias = _key_gradients(*args, **options)
    # The products were with queries in base 2.
    dkey = dkey * LN2
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), dbias, *dtable


def _query_gradient(
    query: Array,
    key: Array,
    value: Array,
    index: BlockIndex,
    key_bias: Array | None,
    lse: Array,
    delta: Array,
    dout: Array,
    *,
    causal: bool,
    interpret: Any,
    bias: PositionBias | None,
) -> list[Array]:
    """The gradient of query `[B, N, H, d]` and, with a `bias`, of its table, in float32."""
    (batch, length, heads, width), dtype = query.shape, query.dtype
    plan = tpu_plan.make_plan(index, width)
    lists, counts, bank = tpu_plan.tables(index, plan)
    args = {
        "lists": lists,
        "counts": counts,
        "query": parts.rows_first(query, dtype),
        "dout": parts.rows_first(dout, dtype),
        "lse": _row(lse, plan.own_length, 0.0),
        "delta": _row(delta, plan.own_length, 0.0),
        "key": parts.rows_first(key, dtype),
        "key_columns": parts.columns_first(key, dtype),
        "value": parts.rows_first(value, dtype),
    }
    specs = dict(zip(("lists", "counts"), parts.table_specs(index, plan, heads, len(lists)), strict=True))
    specs |= {name: parts.rows(plan, width) for name in ("query", "dout")}
    specs |= {name: parts.columns(plan, 1) for name in ("lse", "delta")}
    specs |= {name: parts.whole(args[name], heads, plan.listed_length, width) for name in ("key", "value")}
    specs["key_columns"] = parts.whole(args["key_columns"], heads, width, plan.listed_length)
    parts.add_masks(args, specs, parts.bias_columns(key_bias, index.keys, plan.listed_length, plan.listed), bank)
    lookup = positions.add(args, specs, bias, plan, own_queries=True, table_gradient=True)
    squares = pltpu.VMEM((plan.own // plan.chunk, plan.width, plan.listed, plan.chunk), jnp.float32)
    scratch = {
        "out": pltpu.VMEM((plan.rows + 1, width, plan.own), jnp.float32),
        "logits": [squares] * 2,
        "dweights": [squares] * 2,
    }
    out_specs = {"query": parts.columns(plan, width)}
    out_shape = {"query": jax.ShapeDtypeStruct((batch, heads, width, length), jnp.float32)}
    if lookup is not None:
        sums = (len(lookup.steps.buckets), *positions.REGISTER)
        out_specs["table"] = pl.BlockSpec((None, None, *sums), lambda i, j, s: (i, j, 0, 0, 0))
        out_shape["table"] = jax.ShapeDtypeStruct((batch, heads, *sums), jnp.float32)
    if not parts.fits(specs, args, scratch, plan, "keys", 4 * width):
        args, specs, scratch = tpu_stream.streamed(
            args, specs, scratch, plan, put=("key", "value"), use=("key_columns", "bias")
        )
    specs, params = parts.fit(specs, args, scratch, plan, "keys", 4 * width)
    outs = pl.pallas_call(
        functools.partial(_query_kernel, plan=plan, causal=causal, sizes=(index.queries, index.keys), lookup=lookup),
        grid=(batch, heads, plan.tiles),
        in_specs=[specs],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[scratch],
        compiler_params=params,
        cost_estimate=parts.cost(args, plan, batch * heads, 6 * width),
        interpret=interpret,
        name="block_sparse_attention_query_gradient",
    )(args)
    dquery = jnp.transpose(outs["query"], (0, 3, 1, 2))
    return [dquery] if bias is None else [dquery, positions.table_gradient(outs["table"], bias)]


def _query_kernel(
    inputs: Any, outs: Any, scratch: Any, *, plan: Plan, causal: bool, sizes: tuple[int, int], lookup: Lookup | None
) -> None:
    out = scratch["out"]
    out[...] = jnp.zeros(out.shape, jnp.float32)
    items = tpu_items.of(inputs, scratch, plan, causal=causal, sizes=sizes, lookup=lookup, own_queries=True)
    items.clear(("key", "value"), sizes[1], by_columns=("key_columns",))
    if lookup is not None:
        _start_table(items, outs["table"], sizes[0])
    squares = items.squares(plan.depth)

    def put(buffer: int, row: Any, start: Any) -> None:
        items.put(buffer, row, start, ("logits", "query", "key"), ("dweights", "dout", "value"))

    def use(buffer: int, row: Any, start: Any, count: Any, mask: bool) -> None:
        item = items.item(buffer, row, start, count, mask)
        found: list[Array] = []
        for t in range(items.pieces):
            own, piece = items.own(row, t), items.piece(t)
            lse, delta = inputs["lse"][:, own], inputs["delta"][:, own]
            fresh = []
            for square in squares:
                weights = jnp.exp2(items.logits(item, t, *square) - lse)
                dlogits = weights * (items.square("dweights", item, t, *square) - delta)
                columns = items.columns("key_columns", item, *square)
                fresh.append(parts.product(columns, dlogits.astype(columns.dtype), 1, 0))
                if lookup is not None:
                    found.append(dlogits)
                    w, k, size = square
                    scratch["dweights"][buffer][t, w, pl.ds(k, size), :] = dlogits
            out[row, :, piece] = sum(fresh, out[row, :, piece])
        if lookup is not None and mask:
            dlogits = scratch["dweights"][buffer]
            positions.sum_buckets(inputs, lookup, plan, dlogits, outs["table"], items.step, row, start)
        elif lookup is not None:
            place = items.place(row)
            positions.sum_bucket(inputs, lookup, found, outs["table"], place, item.ids[0], row < plan.rows)

    tpu_plan.walk(inputs["counts"], plan, put, use, items.opens, items.stream)
    for row in range(plan.rows):
        outs["query"][:, pl.ds(row * plan.own, plan.own)] = out[row]


def _start_table(items: tpu_items.Items, table: Any, queries: int) -> None:
    """Zeros for the sums of a head's first step; and where queries end in its last step, as they are summed over too."""
    plan = items.plan

    @pl.when(items.step == 0)
    def _() -> None:
        table[...] = jnp.zeros(table.shape, jnp.float32)

    @pl.when(items.step == plan.tiles - 1)
    def _() -> None:
        own = queries - (plan.tiles - 1) * plan.step_rows
        parts.clear(items.inputs, ("query", "dout"), own, plan.step_rows)


def _key_gradients(
    query: Array,
    key: Array,
    value: Array,
    index: BlockIndex,
    key_bias: Array | None,
    lse: Array,
    delta: Array,
    dout: Array,
    *,
    causal: bool,
    interpret: Any,
    bias: PositionBias | None,
) -> tuple[Array, Array, Array | None]:
    """Gradients of key and value `[B, L, G, d]` and of the bias `[B, L]`, in float32."""
    (batch, _, heads, width), (_, length, groups, _), dtype = query.shape, key.shape, query.dtype
    back = index.transposed()
    plan = tpu_plan.make_plan(back, width)
    lists, counts, bank = tpu_plan.tables(back, plan)
    args = {
        "lists": lists,
        "counts": counts,
        "key": parts.rows_first(key, dtype),
        "value": parts.rows_first(value, dtype),
        "query": parts.rows_first(query, dtype),
        "dout": parts.rows_first(dout, dtype),
        # Queries that fill up the last block have no weights.
        "lse": _row(lse, plan.listed_length, jnp.inf).reshape(batch, heads, plan.blocks, 1, plan.listed),
        "delta": _row(delta, plan.listed_length, 0.0).reshape(batch, heads, plan.blocks, 1, plan.listed),
    }
    own = pl.BlockSpec((None, None, plan.step_rows, width), lambda i, j, s: (i, parts.which(groups, heads)(j), s, 0))
    specs = dict(zip(("lists", "counts"), parts.table_specs(back, plan, heads, len(lists)), strict=True))
    specs |= {"key": own, "value": own}
    specs |= {name: parts.whole(args[name], heads, plan.listed_length, width) for name in ("query", "dout")}
    specs |= {name: parts.whole(args[name], heads) for name in ("lse", "delta")}
    if key_bias is not None:
        args["bias"] = parts.bias_columns(key_bias, length, plan.own_length, plan.step_rows)
        specs["bias"] = pl.BlockSpec((None, None, plan.step_rows, LANES), lambda i, j, s: (i, s, 0, 0))
    parts.add_masks(args, specs, None, None if bank is None else jnp.swapaxes(bank, 1, 2))
    lookup = positions.add(args, specs, bias, plan, own_queries=False)
    squares = pltpu.VMEM((plan.own // plan.chunk, plan.width, plan.chunk, plan.listed), jnp.float32)
    sums = {"key": width, "value": width} | ({} if key_bias is None else {"bias": LANES})
    scratch = {
        "sums": {name: pltpu.VMEM((plan.rows + 1, plan.own, size), jnp.float32) for name, size in sums.items()},
        "logits": [squares] * 2,
        "dweights": [squares] * 2,
    }
    written = sum(4 * size for size in sums.values())
    if not parts.fits(specs, args, scratch, plan, "queries", written):
        args, specs, scratch = tpu_stream.streamed(
            args, specs, scratch, plan, put=("query", "dout"), use=("query", "dout", "lse", "delta")
        )
    specs, params = parts.fit(specs, args, scratch, plan, "queries", written)
    outs = pl.pallas_call(
        functools.partial(_key_kernel, plan=plan, causal=causal, sizes=(index.queries, index.keys), lookup=lookup),
        grid=(batch, heads, plan.tiles),
        in_specs=[specs],
        out_specs={name: parts.rows(plan, size) for name, size in sums.items()},
        out_shape={
            name: jax.ShapeDtypeStruct((batch, heads, length, size), jnp.float32) for name, size in sums.items()
        },
        scratch_shapes=[scratch],
        compiler_params=params,
        cost_estimate=parts.cost(args, plan, batch * heads, 8 * width),
        interpret=interpret,
        name="block_sparse_attention_key_gradients",
    )(args)

    def grouped(x: Float[Array, "B H M d"]) -> Float[Array, "B L G d"]:
        return jnp.swapaxes(x.reshape(batch, groups, -1, *x.shape[2:]).sum(2), 1, 2)

    dbias = None if key_bias is None else jnp.sum(outs["bias"], axis=(1, 3))
    return grouped(outs["key"]), grouped(outs["value"]), dbias


def _key_kernel(
    inputs: Any, outs: Any, scratch: Any, *, plan: Plan, causal: bool, sizes: tuple[int, int], lookup: Lookup | None
) -> None:
    sums = scratch["sums"]
    items = tpu_items.of(inputs, scratch, plan, causal=causal, sizes=sizes, lookup=lookup, own_queries=False)
    items.clear(("query", "dout"), sizes[0])
    for total in sums.values():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def put(buffer: int, row: Any, start: Any) -> None:
        items.put(buffer, row, start, ("logits", "key", "query"), ("dweights", "value", "dout"))

    def use(buffer: int, row: Any, start: Any, count: Any, mask: bool) -> None:
        item = items.item(buffer, row, start, count, mask)
        for t in range(items.pieces):
            piece = items.piece(t)
            fresh: dict[str, list[Array]] = {name: [] for name in sums}
            for square in items.squares(plan.depth):
                x = items.logits(item, t, *square)
                lse, delta = (items.line(name, item, *square) for name in ("lse", "delta"))
                queries, douts = (items.rows(name, item, *square) for name in ("query", "dout"))
                weights = jnp.exp2(x - lse)
                dlogits = weights * (items.square("dweights", item, t, *square) - delta)
                fresh["key"].append(parts.product(dlogits.astype(queries.dtype), queries, 1, 0))
                fresh["value"].append(parts.product(weights.astype(douts.dtype), douts, 1, 0))
                if "bias" in sums:
                    fresh["bias"] += [dlogits[:, lane : lane + LANES] for lane in range(0, plan.depth, LANES)]
            for name, added in fresh.items():
                sums[name][row, piece, :] = sum(added, sums[name][row, piece, :])

    tpu_plan.walk(inputs["counts"], plan, put, use, items.opens, items.stream)
    for name, total in sums.items():
        for row in range(plan.rows):
            outs[name][pl.ds(row * plan.own, plan.own), :] = total[row]


def _row(x: Float[Array, "B H N"], length: int, fill: float) -> Float[Array, "B H 1 M"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])), constant_values=fill)[:, :, None, :]
