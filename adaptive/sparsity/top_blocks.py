# SPDX-License-Identifier: Apache-2.0
"""Blocks chosen by data: the keys of a block stand for it by their mean, and each query block takes the nearest ones.

Shapes: B batch, N queries, L keys, H heads, G key heads, R query blocks, C key blocks, d head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import BlockIndex, from_scores


def pooled_scores(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    *,
    key_bias: Float[Array, "B L"] | None = None,
    causal: bool = False,
    block_q: int = 128,
    block_k: int = 128,
) -> Float[Array, "B H R C"]:
    """Products of mean queries with mean keys, `[B, H, R, C]` float32; -inf for a block with nothing that its queries may see.

    Args:
      query, key: `[B, N, H, d]`, `[B, L, G, d]`; query head h reads key head `h // (H / G)`.
      key_bias: `[B, L]`; keys at -inf are left out of their block's mean.
      causal: query i stands at key i + L - N, and a block that starts after the last of its queries is out.

    Source: Jiang et al. 2024 (MInference), block-sparse heads.
    """
    (batch, length, heads, width), (_, columns, groups, _) = query.shape, key.shape
    query_blocks, key_blocks = -(-length // block_q), -(-columns // block_k)
    seen = jnp.ones((batch, columns), bool) if key_bias is None else key_bias > -jnp.inf
    queries = _means(query, jnp.ones((batch, length), bool), block_q)
    keys = _means(key, seen, block_k)
    queries = queries.reshape(batch, query_blocks, groups, heads // groups, width)
    scores = jnp.einsum("brgsd,bcgd->bgsrc", queries, keys, precision=jax.lax.Precision.HIGHEST)
    scores = scores.reshape(batch, heads, query_blocks, key_blocks) * width**-0.5
    some = jnp.pad(seen, ((0, 0), (0, key_blocks * block_k - columns))).reshape(batch, key_blocks, block_k).any(-1)
    scores = jnp.where(some[:, None, None, :], scores, -jnp.inf)
    if not causal:
        return scores
    last = jnp.minimum((jnp.arange(query_blocks) + 1) * block_q, length) - 1 + columns - length
    return jnp.where(jnp.arange(key_blocks) * block_k <= last[:, None], scores, -jnp.inf)


def top_blocks(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    k: int,
    *,
    key_bias: Float[Array, "B L"] | None = None,
    causal: bool = False,
    shared: bool = False,
    block_q: int = 128,
    block_k: int = 128,
) -> BlockIndex:
    """The `k` key blocks that suit each query block best by `pooled_scores`, a list for every batch row and head.

    Args:
      shared: one list for the query heads that share a key head, by the mean of their scores.
      Others as in `pooled_scores`. With `causal`, the blocks that the diagonal passes through come before all others.

    No gradient flows through the choice.

    Raises:
      ValueError: `k` outside of 1 to C.

    Source: Jiang et al. 2024 (MInference), block-sparse heads: top 100 of blocks of 64.
    Differs: the block of the diagonal is forced, so that no query is left without a key.
    """
    heads, groups = query.shape[2], key.shape[2]
    scores = pooled_scores(query, key, key_bias=key_bias, causal=causal, block_q=block_q, block_k=block_k)
    if shared:
        scores = jnp.mean(scores.reshape(scores.shape[0], groups, heads // groups, *scores.shape[2:]), axis=2)
    if causal:
        # Of equal scores the earliest block is taken, and all queries of a block see the first one of the diagonal.
        first = jnp.arange(scores.shape[2]) * block_q
        last = jnp.minimum(first + block_q, query.shape[1]) - 1
        offset = key.shape[1] - query.shape[1]
        place = jnp.arange(scores.shape[3]) * block_k
        diagonal = (place + block_k > (first + offset)[:, None]) & (place <= (last + offset)[:, None])
        scores = jnp.where(diagonal, jnp.inf, scores)
    sizes = dict(queries=query.shape[1], keys=key.shape[1], block_q=block_q, block_k=block_k)
    return from_scores(scores, k, **sizes)


def _means(x: Float[Array, "B N H d"], seen: Array, block: int) -> Float[Array, "B R H d"]:
    """Means of the rows of each block that are seen, in float32; 0 where none is."""
    room = -x.shape[1] % block
    x = jnp.where(seen[:, :, None, None], x.astype(jnp.float32), 0.0)
    x = jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))).reshape(x.shape[0], -1, block, *x.shape[2:])
    count = jnp.pad(seen, ((0, 0), (0, room))).reshape(seen.shape[0], -1, block).sum(-1)
    return jnp.sum(x, axis=2) / jnp.maximum(count, 1)[:, :, None, None]
