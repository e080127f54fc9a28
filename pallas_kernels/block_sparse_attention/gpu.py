# SPDX-License-Identifier: Apache-2.0
"""Forward pass of block-sparse attention for GPUs, through Triton; `gpu_parts` says how lists are walked.

A program keeps the queries of a tile, their running maximum and sum, and their output, and reads keys and values where they
stand in HBM: nothing is transposed, and nothing copied unless a length or a width is odd.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width.
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
from pallas_kernels.block_sparse_attention.gpu_parts import LN2, LOG2E, LOWEST, Plan
from pallas_kernels.block_sparse_attention.index import BlockIndex
from pallas_kernels.position_bias import PositionBias


def forward(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    value: Float[Array, "B L G d"],
    index: BlockIndex,
    key_bias: Float[Array, "B L"] | None,
    sinks: Float[Array, " H"] | None,
    *,
    causal: bool,
    scale: float,
    bias: PositionBias | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B N H d"], Float[Array, "B H N"]]:
    """Softmax in float32; products in the dtype of `query` with float32 accumulation.

    Raises:
      NotImplementedError: blocks that are not multiples of 16, or heads wider than the registers hold.
    """
    (batch, length, heads, width), dtype = query.shape, query.dtype
    plan = make_plan(index, width, dtype, positions=bias is not None)
    share = heads // key.shape[2]
    args = {
        "query": parts.padded(query, plan.own_length, dtype),
        "key": parts.padded(key, plan.listed_length, dtype),
        "value": parts.padded(value, plan.listed_length, dtype),
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
    specs = {"query": rows, "key": listed, "value": listed}
    if key_bias is not None:
        args["bias"] = parts.last_padded(key_bias * LOG2E, plan.listed_length)
        specs["bias"] = pl.BlockSpec((None, plan.listed_length), lambda _, group, i: (i, 0))
    if sinks is not None:
        args["sinks"] = sinks.astype(jnp.float32) * LOG2E
    out, lse = parts.call(
        functools.partial(_kernel, plan=plan, causal=causal, share=share, factor=scale * LOG2E),
        args,
        specs,
        plan,
        grid=(share * plan.tiles, heads // share, batch),
        out_specs=[rows, pl.BlockSpec((None, None, plan.own), line)],
        out_shape=[
            jax.ShapeDtypeStruct(args["query"].shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, plan.own_length), jnp.float32),
        ],
        interpret=interpret,
        name="block_sparse_attention_forward",
    )
    return out[:, :length, :, :width], lse[..., :length]


def make_plan(index: BlockIndex, width: int, dtype: Any, *, positions: bool = False) -> Plan:
    """Tiles of queries as tall as registers allow, since each reads its keys anew; tiles of keys to suit.

    Raises:
      NotImplementedError: blocks that are not multiples of 16, or heads wider than the registers hold.
    """
    return parts.make_plan(index, *parts.sizes("forward", width, dtype, positions=positions))


def _kernel(
    refs: dict[str, Any], out_ref: Any, lse_ref: Any, *, plan: Plan, causal: bool, share: int, factor: float
) -> None:
    step, group, row = (pl.program_id(axis) for axis in range(3))
    member, tile = parts.own(step, share, plan, causal)
    head = group * share + member
    place = parts.place(refs["ids"], row, head, pl.num_programs(1) * share, tile, plan)
    query, stands = refs["query"][...], positions.own(refs, row, tile, plan)

    def work(number: Any, start: Any, mask: Any, masked: bool, state: Any) -> Any:
        peak, total, out = state
        rows = pl.ds(number * plan.listed_block + start, plan.listed)
        logits = parts.product(query, refs["key"][rows, :], 1, 1) * factor
        if "bias" in refs:
            logits += refs["bias"][rows][None, :]
        if stands is not None:
            logits += positions.bias(refs, head, positions.relative(refs, row, rows, stands, own_queries=True))
        if masked:
            logits = jnp.where(
                parts.seen(refs, plan, tile * plan.own, number, start, mask, causal, True), logits, -jnp.inf
            )
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(peak - higher)
        value = refs["value"][rows, :]
        fresh = parts.product(weights.astype(value.dtype), value, 1, 0)
        return higher, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + fresh

    start = refs["sinks"][head] if "sinks" in refs else LOWEST
    state = (
        jnp.full((plan.own,), start, jnp.float32),
        jnp.full((plan.own,), 1.0 if "sinks" in refs else 0.0, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    peak, total, out = parts.walk(refs, place, plan, work, state)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(some, (peak + jnp.log2(total)) * LN2, -jnp.inf)
