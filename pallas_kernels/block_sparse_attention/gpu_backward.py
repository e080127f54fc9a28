# SPDX-License-Identifier: Apache-2.0
"""Backward pass of block-sparse attention for GPUs: one kernel over the lists, one over the transposed lists.

Weights are computed again from the log-sum-exp in both. A program of the second kernel works all query heads that share its
keys, one after the other, so that no sum crosses programs and runs repeat bit for bit.

Shapes: B batch, N queries, L keys, H heads, G key heads, S query heads that share one, d head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import gpu_parts as parts
from pallas_kernels.block_sparse_attention import gpu_positions as positions
from pallas_kernels.block_sparse_attention.gpu_parts import LOG2E, Plan
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
    arrays = (query, key, value, key_bias, lse * LOG2E, delta, dout)
    options = dict(causal=causal, scale=scale, bias=bias, interpret=interpret)
    dkey, dvalue, dbias = _key_gradients(*arrays, index.transposed(), **options)
    dquery, *dtable = _query_gradient(*arrays, index, **options)
    return dquery, dkey, dvalue, dbias, *dtable


def _query_gradient(
    query: Array,
    key: Array,
    value: Array,
    key_bias: Array | None,
    lse: Array,
    delta: Array,
    dout: Array,
    index: BlockIndex,
    *,
    causal: bool,
    scale: float,
    bias: PositionBias | None,
    interpret: Any,
) -> list[Array]:
    """The gradient of query `[B, N, H, d]` and, with a `bias`, of its table."""
    (batch, length, heads, width), dtype = query.shape, query.dtype
    plan = parts.make_plan(index, *parts.sizes("query_gradient", width, dtype, positions=bias is not None))
    share = heads // key.shape[2]
    args = {
        "query": parts.padded(query, plan.own_length, dtype),
        "dout": parts.padded(dout, plan.own_length, dtype),
        "key": parts.padded(key, plan.listed_length, dtype),
        "value": parts.padded(value, plan.listed_length, dtype),
        # Queries that fill up the last block have no weights.
        "lse": parts.last_padded(lse, plan.own_length, jnp.inf),
        "delta": parts.last_padded(delta, plan.own_length),
        **parts.lists(index, causal, own_queries=True),
    }
    parts.add_bank(args, index)
    positions.add(args, bias, plan, own_queries=True)
    wide = args["query"].shape[3]

    def line(step: Any, group: Any, i: Any) -> tuple[Any, Any, Any]:
        member, tile = parts.own(step, share, plan, causal)
        return i, group * share + member, tile

    def block(*place: Any) -> tuple[Any, Any, Any, int]:
        i, head, tile = line(*place)
        return i, tile, head, 0

    rows = pl.BlockSpec((None, plan.own, None, wide), block)
    listed = pl.BlockSpec((None, plan.listed_length, None, wide), lambda _, group, i: (i, 0, group, 0))
    row = pl.BlockSpec((None, None, plan.own), line)
    specs = {"query": rows, "dout": rows, "key": listed, "value": listed, "lse": row, "delta": row}
    if key_bias is not None:
        args["bias"] = parts.last_padded(key_bias * LOG2E, plan.listed_length)
        specs["bias"] = pl.BlockSpec((None, plan.listed_length), lambda _, group, i: (i, 0))
    out_specs, out_shape = [rows], [jax.ShapeDtypeStruct(args["query"].shape, dtype)]
    if bias is not None:
        size = positions.sums_size(len(args["places"]))
        out_specs.append(pl.BlockSpec((None, None, None, size), lambda *step: (*line(*step), 0)))
        out_shape.append(jax.ShapeDtypeStruct((batch, heads, plan.tiles, size), jnp.float32))
    out, *sums = parts.call(
        functools.partial(_query_kernel, plan=plan, causal=causal, share=share, scale=scale),
        args,
        specs,
        plan,
        grid=(share * plan.tiles, heads // share, batch),
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret,
        name="block_sparse_attention_query_gradient",
    )
    return [out[:, :length, :, :width], *(positions.table_gradient(one, bias) for one in sums)]


def _query_kernel(
    refs: dict[str, Any], out_ref: Any, *sums_ref: Any, plan: Plan, causal: bool, share: int, scale: float
) -> None:
    step, group, row = (pl.program_id(axis) for axis in range(3))
    member, tile = parts.own(step, share, plan, causal)
    head = group * share + member
    place = parts.place(refs["ids"], row, head, pl.num_programs(1) * share, tile, plan)
    stands = positions.own(refs, row, tile, plan)
    query, dout, lse, delta = (refs[name][...] for name in ("query", "dout", "lse", "delta"))

    def work(number: Any, start: Any, mask: Any, masked: bool, state: Any) -> Any:
        out, *sums = state
        rows = pl.ds(number * plan.listed_block + start, plan.listed)
        key = refs["key"][rows, :]
        logits = parts.product(query, key, 1, 1) * (scale * LOG2E)
        if "bias" in refs:
            logits += refs["bias"][rows][None, :]
        if stands is not None:
            apart = positions.relative(refs, row, rows, stands, own_queries=True)
            logits += positions.bias(refs, head, apart)
        if masked:
            logits = jnp.where(
                parts.seen(refs, plan, tile * plan.own, number, start, mask, causal, True), logits, -jnp.inf
            )
        weights = jnp.exp2(logits - lse[:, None])
        dlogits = weights * (parts.product(dout, refs["value"][rows, :], 1, 1) - delta[:, None])
        sums = [positions.sum_buckets(refs, apart, dlogits, one) for one in sums]
        return out + parts.product(dlogits.astype(key.dtype), key, 1, 0), *sums

    state = (jnp.zeros(query.shape, jnp.float32), *(positions.no_sums(refs) for _ in sums_ref))
    out, *sums = parts.walk(refs, place, plan, work, state)
    out_ref[...] = (out * scale).astype(out_ref.dtype)
    for ref, one in zip(sums_ref, sums, strict=True):
        ref[...] = one


def _key_gradients(
    query: Array,
    key: Array,
    value: Array,
    key_bias: Array | None,
    lse: Array,
    delta: Array,
    dout: Array,
    back: BlockIndex,
    *,
    causal: bool,
    scale: float,
    bias: PositionBias | None,
    interpret: Any,
) -> tuple[Float[Array, "B L G d"], Float[Array, "B L G d"], Float[Array, "B L"] | None]:
    (batch, length, groups, width), heads, dtype = key.shape, query.shape[2], query.dtype
    plan = parts.make_plan(back, *parts.sizes("key_gradients", width, dtype, positions=bias is not None))
    share = heads // groups
    args = {
        "key": parts.padded(key, plan.own_length, dtype),
        "value": parts.padded(value, plan.own_length, dtype),
        "query": parts.padded(query, plan.listed_length, dtype),
        "dout": parts.padded(dout, plan.listed_length, dtype),
        # Queries that fill up the last block have no weights.
        "lse": parts.last_padded(lse, plan.listed_length, jnp.inf),
        "delta": parts.last_padded(delta, plan.listed_length),
        **parts.lists(back, causal, own_queries=False),
    }
    parts.add_bank(args, back)
    positions.add(args, bias, plan, own_queries=False)
    wide = args["key"].shape[3]
    rows = pl.BlockSpec((None, plan.own, None, wide), lambda tile, group, i: (i, tile, group, 0))
    listed = pl.BlockSpec((None, plan.listed_length, share, wide), lambda tile, group, i: (i, 0, group, 0))
    lines = pl.BlockSpec((None, share, plan.listed_length), lambda tile, group, i: (i, group, 0))
    specs = {"key": rows, "value": rows, "query": listed, "dout": listed, "lse": lines, "delta": lines}
    out_specs = [rows, rows]
    out_shape = [jax.ShapeDtypeStruct(args[name].shape, dtype) for name in ("key", "value")]
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
    dkey, dvalue = (leaf[:, :length, :, :width] for leaf in (dkey, dvalue))
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
    tile, group, row = (pl.program_id(axis) for axis in range(3))
    heads = pl.num_programs(1) * share
    key, value, stands = refs["key"][...], refs["value"][...], positions.own(refs, row, tile, plan)

    # Logits are held as keys x queries, so that no product needs them transposed.
    def member(one: Any, state: Any) -> Any:
        place = parts.place(refs["ids"], row, group * share + one, heads, tile, plan)

        def work(number: Any, start: Any, mask: Any, masked: bool, state: Any) -> Any:
            dkey, dvalue, *dbias = state
            rows = pl.ds(number * plan.listed_block + start, plan.listed)
            query, dout = (refs[name][rows, one, :] for name in ("query", "dout"))
            lse, delta = (refs[name][one, rows] for name in ("lse", "delta"))
            logits = parts.product(key, query, 1, 1) * (scale * LOG2E)
            if "bias" in refs:
                logits += refs["bias"][...][:, None]
            if stands is not None:
                apart = positions.relative(refs, row, rows, stands, own_queries=False)
                logits += positions.bias(refs, group * share + one, apart)
            if masked:
                pairs = parts.seen(refs, plan, tile * plan.own, number, start, mask, causal, False)
                logits = jnp.where(pairs, logits, -jnp.inf)
            weights = jnp.exp2(logits - lse[None, :])
            dvalue += parts.product(weights.astype(dout.dtype), dout, 1, 0)
            dlogits = weights * (parts.product(value, dout, 1, 1) - delta[None, :])
            dkey += parts.product(dlogits.astype(query.dtype), query, 1, 0)
            return dkey, dvalue, *(total + jnp.sum(dlogits, axis=1) for total in dbias)

        return parts.walk(refs, place, plan, work, state)

    zeros = jnp.zeros(key.shape, jnp.float32)
    # A sum that nobody asks for would cost registers all the same.
    state = (zeros, zeros, *(jnp.zeros((plan.own,), jnp.float32) for _ in dbias_ref))
    dkey, dvalue, *dbias = member(0, state) if share == 1 else jax.lax.fori_loop(0, share, member, state)
    dkey_ref[...] = (dkey * scale).astype(dkey_ref.dtype)
    dvalue_ref[...] = dvalue.astype(dvalue_ref.dtype)
    for ref, total in zip(dbias_ref, dbias, strict=True):
        ref[...] = total
