# SPDX-License-Identifier: Apache-2.0
"""Forward pass of block-sparse attention for GPUs, through Triton; `gpu_parts` says how lists are walked.

A program keeps the queries of a tile, their running maximum and sum, and their output, and reads keys and values where they
stand in HBM: nothing is transposed, padded or copied.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import gpu_parts as parts
from pallas_kernels.block_sparse_attention import gpu_tiles as tiles
from pallas_kernels.block_sparse_attention.gpu_parts import LN2, LOG2E, LOWEST, Entry, Plan
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
    call = tiles.queries("forward", {"query": query}, key, value, index, key_bias, bias, causal=causal)
    args = dict(call.args)
    if sinks is not None:
        args["sinks"] = sinks.astype(jnp.float32) * LOG2E
    batch, length, heads, _ = query.shape
    out, lse = parts.call(
        functools.partial(_kernel, plan=call.plan, causal=causal, share=call.share, factor=scale * LOG2E),
        args,
        call.specs,
        call.plan,
        grid=call.grid,
        out_specs=[call.rows, call.line],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, call.plan.own_length), jnp.float32),
        ],
        interpret=interpret,
        name="block_sparse_attention_forward",
    )
    return out, lse[..., :length]


def _kernel(
    refs: dict[str, Any], out_ref: Any, lse_ref: Any, *, plan: Plan, causal: bool, share: int, factor: float
) -> None:
    program = tiles.of_queries(refs, plan, causal, share)
    query = program.own("query")

    def work(entry: Entry, state: Any) -> Any:
        peak, total, out = state
        logits = program.logits(query, program.listed("key", entry), factor, entry)
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(peak - higher)
        value = program.listed("value", entry)
        fresh = parts.product(weights.astype(value.dtype), value, 1, 0)
        return higher, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + fresh

    start = refs["sinks"][program.head] if "sinks" in refs else LOWEST
    state = (
        jnp.full((plan.own,), start, jnp.float32),
        jnp.full((plan.own,), 1.0 if "sinks" in refs else 0.0, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    peak, total, out = program.walk(work, state)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    program.put(out_ref, out / total[:, None])
    lse_ref[...] = jnp.where(some, (peak + jnp.log2(total)) * LN2, -jnp.inf)
