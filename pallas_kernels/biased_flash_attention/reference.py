# SPDX-License-Identifier: Apache-2.0
"""Biased attention written plainly in float32; what every implementation is compared with.

Shapes: B batch, Q queries, K keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.position_bias import PositionBias


def attention_map(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    *,
    key_bias: Float[Array, "B K"] | None = None,
    bias: Float[Array, "b H Q K"] | PositionBias | None = None,
    causal: bool = False,
    softmax: str = "standard",
    scale: float | None = None,
) -> Float[Array, "B H Q K"]:
    """The whole attention map `[B, H, Q, K]` in float32; rows without a key are zero."""
    heads, width = query.shape[2:]
    key = jnp.repeat(key, heads // key.shape[2], axis=2)
    scale = width**-0.5 if scale is None else scale
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=jax.lax.Precision.HIGHEST) * scale
    if bias is not None:
        bias = bias.dense() if isinstance(bias, PositionBias) else bias
        logits += bias.astype(jnp.float32)
    if key_bias is not None:
        logits += key_bias.astype(jnp.float32)[:, None, None, :]
    if causal:
        # The queries are the last Q of the K positions.
        rows, columns = logits.shape[-2:]
        logits = jnp.where(jnp.tri(rows, columns, columns - rows, dtype=bool), logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    peak = jnp.maximum(peak, 0.0) if softmax == "off_by_one" else jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(logits - jax.lax.stop_gradient(peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if softmax == "off_by_one":
        return weights / (total + jnp.exp(-jax.lax.stop_gradient(peak)))
    return weights / jnp.where(total > 0, total, 1.0)


def biased_attention(query: Array, key: Array, value: Array, **options: object) -> Float[Array, "B Q H d"]:
    """`attention_map` times `value [B, K, G, d]`, in the dtype of `query`."""
    value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2).astype(jnp.float32)
    weights = attention_map(query, key, **options)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=jax.lax.Precision.HIGHEST)
    return out.astype(query.dtype)


def attention_column_stats(
    query: Array,
    key: Array,
    *,
    query_weight: Float[Array, "B Q"] | None = None,
    statistic: str = "sum",
    **options: object,
) -> Float[Array, "B H K"]:
    """Columns of `attention_map` times `query_weight` (1 when None), summed over queries or their maximum."""
    weights = attention_map(query, key, **options)
    if statistic == "max":
        return jnp.max(weights if query_weight is None else weights * query_weight[:, None, :, None], axis=2)
    if query_weight is None:
        return jnp.sum(weights, axis=2)
    return jnp.einsum("bhqk,bq->bhk", weights, query_weight.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def attention_score_excess(
    query: Array,
    key: Array,
    *,
    threshold: float,
    bias: Array | PositionBias | None,
    scale: float,
    query_mask: Bool[Array, "B Q"] | None,
    key_mask: Bool[Array, "B K"] | None,
) -> Float[Array, " B"]:
    """`max(logits, threshold) - threshold` of the whole map, its mean over heads and pairs of real tokens."""
    heads = query.shape[2]
    key = jnp.repeat(key, heads // key.shape[2], axis=2).astype(jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query.astype(jnp.float32), key, precision=jax.lax.Precision.HIGHEST) * scale
    if bias is not None:
        bias = bias.dense() if isinstance(bias, PositionBias) else bias
        logits += bias.astype(jnp.float32)
    pairs = jnp.ones((query.shape[0], 1, query.shape[1], key.shape[1]), bool)
    if query_mask is not None:
        pairs &= query_mask[:, None, :, None]
    if key_mask is not None:
        pairs &= key_mask[:, None, None, :]
    total = jnp.sum(jnp.where(pairs, jnp.maximum(logits, threshold) - threshold, 0.0), axis=(1, 2, 3))
    return total / jnp.maximum(heads * jnp.sum(pairs, axis=(1, 2, 3)), 1)
