# SPDX-License-Identifier: Apache-2.0
"""Backward pass of block-sparse attention for GPUs: kernels over the lists, and one over the transposed lists.

Weights are computed again from the log-sum-exp in each. A program of the kernel over transposed lists works all query heads
that share its keys, one after the other, so that no sum crosses programs and runs repeat bit for bit. The gradient of a bias
by positions is summed by bucket in a kernel of its own over near blocks, which are few in long sequences; the kernel of the
query's gradient sums the others, whose pairs are all in the first or all in the last bucket.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width, M queries with padding, T tiles, S room for buckets.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import gpu_parts as parts
from pallas_kernels.block_sparse_attention import gpu_positions as positions
from pallas_kernels.block_sparse_attention import gpu_tiles as tiles
from pallas_kernels.block_sparse_attention.gpu_parts import LOG2E, Entry, Plan
from pallas_kernels.block_sparse_attention.index import BlockIndex
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
      NotImplementedError: blocks that are not multiples of 16, or heads wider than the registers hold.
    """
    options = dict(causal=causal, scale=scale, bias=bias, interpret=interpret)
    own = {"query": query, "dout": dout, "lse": lse * LOG2E, "delta": delta}
    dkey, dvalue, dbias = _key_gradients(own, key, value, key_bias, index.transposed(), **options)
    dquery, *ends = _query_gradient(own, key, value, key_bias, index, **options)
    if bias is None:
        return dquery, dkey, dvalue, dbias
    sums = _bucket_sums(own, key, value, key_bias, index, **options)
    return dquery, dkey, dvalue, dbias, positions.table_gradient(sums, ends, bias)


def _query_gradient(
    own: dict[str, Array],
    key: Array,
    value: Array,
    key_bias: Array | None,
    index: BlockIndex,
    *,
    causal: bool,
    scale: float,
    bias: PositionBias | None,
    interpret: Any,
) -> list[Array]:
    """The gradient of query `[B, N, H, d]` and, with a `bias`, what `sum_ends` makes: two of `[B, H, M]`."""
    query = own["query"]
    call = tiles.queries("query_gradient", own, key, value, index, key_bias, bias, causal=causal)
    ends = jax.ShapeDtypeStruct((query.shape[0], query.shape[2], call.plan.own_length), jnp.float32)
    count = 0 if bias is None else 2
    return parts.call(
        functools.partial(_query_kernel, plan=call.plan, causal=causal, share=call.share, scale=scale),
        call.args,
        call.specs,
        call.plan,
        grid=call.grid,
        out_specs=[call.rows, *[call.line] * count],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), *[ends] * count],
        interpret=interpret,
        name="block_sparse_attention_query_gradient",
    )


def _query_kernel(
    refs: dict[str, Any], out_ref: Any, *ends_refs: Any, plan: Plan, causal: bool, share: int, scale: float
) -> None:
    program = tiles.of_queries(refs, plan, causal, share)
    own = _own(program)

    def work(entry: Entry, state: Any) -> Any:
        out, *ends = state
        listed = {name: program.listed(name, entry) for name in ("key", "value")}
        _, dlogits = program.dlogits(own, listed, scale, entry)
        if ends and not entry.closed:
            ends = positions.sum_ends(program.stands, program.rows(entry), dlogits, ends)
        return out + parts.product(dlogits.astype(listed["key"].dtype), listed["key"], 1, 0), *ends

    state = (jnp.zeros(own["query"].shape, jnp.float32), *(jnp.zeros((plan.own,), jnp.float32) for _ in ends_refs))
    out, *ends = program.walk(work, state)
    program.put(out_ref, out * scale)
    for ref, end in zip(ends_refs, ends, strict=True):
        ref[...] = end


def _own(program: tiles.Program) -> dict[str, Array]:
    """What a program that owns queries has of them."""
    rows = {name: program.own(name) for name in ("query", "dout")}
    return rows | {name: program.refs[name][...] for name in ("lse", "delta")}


def _bucket_sums(
    own: dict[str, Array],
    key: Array,
    value: Array,
    key_bias: Array | None,
    index: BlockIndex,
    *,
    causal: bool,
    scale: float,
    bias: PositionBias,
    interpret: Any,
) -> Float[Array, "B H T S"]:
    """What `sum_buckets` makes of each tile of queries and the blocks that are not open."""
    batch, _, heads, _ = own["query"].shape
    call = tiles.queries("bucket_sums", own, key, value, index, key_bias, bias, causal=causal)
    size = call.args["places"].size
    return parts.call(
        functools.partial(_bucket_kernel, plan=call.plan, causal=causal, share=call.share, scale=scale),
        call.args,
        call.specs,
        call.plan,
        grid=call.grid,
        out_specs=pl.BlockSpec((None, None, None, size), lambda *step: (*call.line.index_map(*step), 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, call.plan.tiles, size), jnp.float32),
        interpret=interpret,
        name="block_sparse_attention_bucket_sums",
    )


def _bucket_kernel(refs: dict[str, Any], sums_ref: Any, *, plan: Plan, causal: bool, share: int, scale: float) -> None:
    program = tiles.of_queries(refs, plan, causal, share)
    own = _own(program)

    def work(entry: Entry, sums: Any) -> Any:
        listed = {name: program.listed(name, entry) for name in ("key", "value")}
        _, dlogits = program.dlogits(own, listed, scale, entry)
        return positions.sum_buckets(refs, program.stands, program.rows(entry), dlogits, sums)

    sums_ref[...] = parts.walk_closed(refs, program.place, plan, work, jnp.zeros(sums_ref.shape, jnp.float32))


def _key_gradients(
    queries: dict[str, Array],
    key: Array,
    value: Array,
    key_bias: Array | None,
    back: BlockIndex,
    *,
    causal: bool,
    scale: float,
    bias: PositionBias | None,
    interpret: Any,
) -> tuple[Float[Array, "B L G d"], Float[Array, "B L G d"], Float[Array, "B L"] | None]:
    (batch, length, groups, width), dtype = key.shape, queries["query"].dtype
    plan = parts.make_plan("key_gradients", back, width, dtype, positions=bias is not None)
    share = queries["query"].shape[2] // groups
    args = {
        **{name: x.astype(dtype) for name, x in (("key", key), ("value", value))},
        **{name: queries[name].astype(dtype) for name in ("query", "dout")},
        # Queries that fill up the last block have no weights.
        "lse": parts.last_padded(queries["lse"], plan.listed_length, jnp.inf),
        "delta": parts.last_padded(queries["delta"], plan.listed_length),
        **parts.lists(back, causal, own_queries=False, near=positions.near(bias, back, own_queries=False)),
    }
    parts.add_bank(args, back)
    positions.add(args, bias, plan, own_queries=False)
    rows = pl.BlockSpec((None, plan.own, None, plan.wide), lambda tile, group, i: (i, tile, group, 0))
    listed = pl.BlockSpec((None, plan.listed_length, share, plan.wide), lambda tile, group, i: (i, 0, group, 0))
    lines = pl.BlockSpec((None, share, plan.listed_length), lambda tile, group, i: (i, group, 0))
    specs = {"key": rows, "value": rows, "query": listed, "dout": listed, "lse": lines, "delta": lines}
    out_specs = [rows, rows]
    out_shape = [jax.ShapeDtypeStruct(key.shape, dtype)] * 2
    if key_bias is not None:
        args["bias"] = parts.last_padded(key_bias * LOG2E, plan.own_length)
        specs["bias"] = pl.BlockSpec((None, plan.own), lambda tile, group, i: (i, tile))
        out_specs.append(pl.BlockSpec((None, None, plan.own), lambda tile, group, i: (i, group, tile)))
        out_shape.append(jax.ShapeDtypeStruct((batch, groups, plan.own_length), jnp.float32))
    dkey, dvalue, *dbias = parts.call(
        functools.partial(_key_kernel, plan=plan, causal=causal, scale=scale, share=share),
        args,
        specs,
        plan,
        grid=(plan.tiles, groups, batch),
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret,
        name="block_sparse_attention_key_gradients",
    )
    return dkey, dvalue, None if key_bias is None else jnp.sum(dbias[0][..., :length], axis=1)


def _key_kernel(
    refs: dict[str, Any],
    dkey_ref: Any,
    dvalue_ref: Any,
    *dbias_ref: Any,
    plan: Plan,
    causal: bool,
    scale: float,
    share: int,
) -> None:
    first = tiles.of_keys(refs, plan, causal, share)
    own = {name: first.own(name) for name in ("key", "value")}

    # Logits are held as keys x queries, so that no product needs them transposed.
    def member(one: Any, state: Any) -> Any:
        program = dataclasses.replace(first, head=first.head + one)

        def work(entry: Entry, state: Any) -> Any:
            dkey, dvalue, *dbias = state
            listed = {name: program.listed(name, entry, one) for name in ("query", "dout")}
            lines = {name: refs[name][one, program.rows(entry)] for name in ("lse", "delta")}
            weights, dlogits = program.dlogits(own, listed | lines, scale, entry)
            query, dout = listed["query"], listed["dout"]
            dvalue += parts.product(weights.astype(dout.dtype), dout, 1, 0)
            dkey += parts.product(dlogits.astype(query.dtype), query, 1, 0)
            return dkey, dvalue, *(total + jnp.sum(dlogits, axis=1) for total in dbias)

        return program.walk(work, state)

    zeros = jnp.zeros(own["key"].shape, jnp.float32)
    # A sum that nobody asks for would cost registers all the same.
    state = (zeros, zeros, *(jnp.zeros((plan.own,), jnp.float32) for _ in dbias_ref))
    dkey, dvalue, *dbias = member(jnp.int32(0), state) if share == 1 else jax.lax.fori_loop(0, share, member, state)
    first.put(dkey_ref, dkey * scale)
    first.put(dvalue_ref, dvalue)
    for ref, total in zip(dbias_ref, dbias, strict=True):
        ref[...] = total
