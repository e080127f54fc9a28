# SPDX-License-Identifier: Apache-2.0
"""Biased attention and its column statistics for GPUs: block sizes, and the pass over columns.

In that pass a program owns keys and walks the queries: half the products of the first pass.

Shapes: B batch, Q queries, K keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.biased_flash_attention.over_blocks import Kernels
from pallas_kernels.block_sparse_attention import gpu as sparse
from pallas_kernels.block_sparse_attention import gpu_backward
from pallas_kernels.block_sparse_attention import gpu_parts as parts
from pallas_kernels.block_sparse_attention import gpu_positions as positions
from pallas_kernels.block_sparse_attention import gpu_tiles as tiles
from pallas_kernels.block_sparse_attention.gpu_parts import LOG2E, Entry, Plan
from pallas_kernels.block_sparse_attention.index import BlockIndex
from pallas_kernels.position_bias import PositionBias

# The tallest tile of the kernels.
_LARGEST = 128


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
    (batch, rows, heads, width), (_, length, groups, _), dtype = query.shape, key.shape, query.dtype
    back = index.transposed()
    plan = parts.make_plan("forward", back, width, dtype, positions=bias is not None)
    share = heads // groups
    weight = jnp.ones((batch, rows)) if query_weight is None else query_weight
    args = {
        "key": key.astype(dtype),
        "query": query,
        # Queries that fill up the last block have no weights.
        "lse": parts.last_padded(lse, plan.listed_length, jnp.inf),
        "weight": parts.last_padded(weight, plan.listed_length),
        **parts.lists(back, causal, own_queries=False, near=positions.near(bias, back, own_queries=False)),
    }
    positions.add(args, bias, plan, own_queries=False)
    specs = {
        "key": pl.BlockSpec((None, plan.own, None, plan.wide), lambda tile, head, i: (i, tile, head // share, 0)),
        "query": pl.BlockSpec((None, plan.listed_length, None, plan.wide), lambda tile, head, i: (i, 0, head, 0)),
        "lse": pl.BlockSpec((None, None, plan.listed_length), lambda tile, head, i: (i, head, 0)),
        "weight": pl.BlockSpec((None, plan.listed_length), lambda tile, head, i: (i, 0)),
    }
    if key_bias is not None:
        args["bias"] = parts.last_padded(key_bias * LOG2E, plan.own_length)
        specs["bias"] = pl.BlockSpec((None, plan.own), lambda tile, head, i: (i, tile))
    out = parts.call(
        functools.partial(_kernel, plan=plan, causal=causal, factor=scale * LOG2E, statistic=statistic),
        args,
        specs,
        plan,
        grid=(plan.tiles, heads, batch),
        out_specs=pl.BlockSpec((None, None, plan.own), lambda tile, head, i: (i, head, tile)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, plan.own_length), jnp.float32),
        interpret=interpret,
        name="attention_column_stats",
    )
    return out[..., :length]


def _kernel(refs: dict[str, Any], out_ref: Any, *, plan: Plan, causal: bool, factor: float, statistic: str) -> None:
    program = tiles.of_keys(refs, plan, causal, 1)
    key = program.own("key")

    def work(entry: Entry, total: Any) -> Any:
        logits, rows = program.logits(key, program.listed("query", entry), factor, entry), program.rows(entry)
        weights = jnp.exp2(logits - refs["lse"][rows][None, :]) * refs["weight"][rows][None, :]
        if statistic == "max":
            return jnp.maximum(total, jnp.max(weights, axis=1))
        return total + jnp.sum(weights, axis=1)

    out_ref[...] = program.walk(work, jnp.zeros((plan.own,), jnp.float32))


def _block(length: int) -> int:
    """As large as tiles and the length allow."""
    return min(_LARGEST, max(parts.SMALLEST, pl.next_power_of_2(length)))


KERNELS = Kernels("GPU", sparse.forward, gpu_backward.backward, _columns, _block)
