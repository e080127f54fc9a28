# SPDX-License-Identifier: Apache-2.0
"""Biased attention in plain JAX, laid out for the compiler.

Shapes: B batch, Q queries, K keys, G key heads, R query heads that share one key head (H = G R), d head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Rows of the map that exist at a time in `attention_column_stats`: B H 128 K floats, a few MB at common sizes.
_QUERY_BLOCK = 128


def biased_attention(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    value: Float[Array, "B K G d"],
    *,
    key_bias: Float[Array, "B K"] | None,
    bias: Float[Array, "b H Q K"] | None,
    causal: bool,
    softmax: str,
    scale: float,
) -> Float[Array, "B Q H d"]:
    """Softmax in float32; products in the input dtype with float32 accumulation."""
    offset = key.shape[1] - query.shape[1]
    weights, total = _exponentials(
        _group(query * scale, key), key, key_bias, _group_bias(bias, key), softmax, causal, offset
    )
    # Dividing after the product touches [Q, d] numbers in place of [Q, K].
    out = jnp.einsum("bgrqk,bkgd->bgrqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    out = (out / total[..., None]).astype(query.dtype)
    return jnp.moveaxis(out, 3, 1).reshape(*query.shape[:3], value.shape[-1])


def attention_column_stats(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    *,
    key_bias: Float[Array, "B K"] | None,
    bias: Float[Array, "b H Q K"] | None,
    causal: bool,
    softmax: str,
    scale: float,
    query_weight: Float[Array, "B Q"] | None,
) -> Float[Array, "B H K"]:
    """Weighted column sums, `_QUERY_BLOCK` rows of the map at a time."""
    batch, length, heads, _ = query.shape
    weight = jnp.ones((batch, length), jnp.float32) if query_weight is None else query_weight.astype(jnp.float32)
    block = min(length, _QUERY_BLOCK)
    blocks = -(-length // block)
    padding = blocks * block - length

    def split(values: Array, axis: int) -> Array:
        widths = [(0, padding if i == axis else 0) for i in range(values.ndim)]
        values = jnp.pad(values, widths)
        values = values.reshape(*values.shape[:axis], blocks, block, *values.shape[axis + 1 :])
        return jnp.moveaxis(values, axis, 0)

    rows = {
        "query": split(_group(query * scale, key), 1),
        "weight": split(weight, 1),
        "start": jnp.arange(blocks) * block,
    }
    if bias is not None:
        rows["bias"] = split(_group_bias(bias, key), 3)

    # Rows are recomputed in the backward pass; otherwise the loop would keep the whole map.
    @jax.checkpoint
    def add(sums: Array, row: dict[str, Array]) -> tuple[Array, None]:
        offset = row["start"] + key.shape[1] - length
        weights, total = _exponentials(row["query"], key, key_bias, row.get("bias"), softmax, causal, offset)
        share = row["weight"][:, None, None, :] / total
        return sums + jnp.einsum("bgrqk,bgrq->bgrk", weights, share, precision=jax.lax.Precision.HIGHEST), None

    sums = jnp.zeros((batch, key.shape[2], heads // key.shape[2], key.shape[1]), jnp.float32)
    if blocks == 1:
        sums, _ = add(sums, jax.tree.map(lambda leaf: leaf[0], rows))
    else:
        sums, _ = jax.lax.scan(add, sums, rows)
    return sums.reshape(batch, heads, -1)


def _exponentials(
    query: Float[Array, "B Q G R d"],
    key: Float[Array, "B K G d"],
    key_bias: Float[Array, "B K"] | None,
    bias: Float[Array, "b G R Q K"] | None,
    softmax: str,
    causal: bool,
    offset: int | Array,
) -> tuple[Float[Array, "B G R Q K"], Float[Array, "B G R Q"]]:
    """Attention before normalisation, and what to divide by (never 0)."""
    logits = jnp.einsum("bqgrd,bkgd->bgrqk", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if key_bias is not None:
        logits += key_bias.astype(jnp.float32)[:, None, None, None, :]
    if causal:
        row = jnp.arange(logits.shape[-2])[:, None] + offset
        logits = jnp.where(jnp.arange(logits.shape[-1]) <= row, logits, -jnp.inf)
    # The result does not depend on the peak, so no gradient flows through it.
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    if softmax == "off_by_one":
        peak = jnp.maximum(peak, 0.0)
        weights = jnp.exp(logits - peak[..., None])
        return weights, jnp.sum(weights, axis=-1) + jnp.exp(-peak)
    # -inf - -inf would be nan in a row without keys; with 0 its weights are exp(-inf) = 0.
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak)[..., None])
    total = jnp.sum(weights, axis=-1)
    return weights, jnp.where(total > 0, total, 1.0)


def _group(query: Float[Array, "B Q H d"], key: Float[Array, "B K G d"]) -> Float[Array, "B Q G R d"]:
    batch, length, heads, width = query.shape
    return query.reshape(batch, length, key.shape[2], heads // key.shape[2], width)


def _group_bias(bias: Array | None, key: Float[Array, "B K G d"]) -> Float[Array, "b G R Q K"] | None:
    return None if bias is None else bias.reshape(bias.shape[0], key.shape[2], -1, *bias.shape[2:])
