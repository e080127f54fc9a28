# SPDX-License-Identifier: Apache-2.0
"""Biased attention in plain JAX, laid out for the compiler.

Everything runs as one batched matrix product for each row of the batch and key head: heads are moved before tokens by hand
(left to itself the CPU compiler picks layouts three times slower), and the query heads that share a key head are stacked.

Shapes: B batch, Q queries, K keys, H heads, G key heads, R query heads that share one (H = G R), S = R Q stacked queries,
d head width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.biased_flash_attention.settings import Settings
from pallas_kernels.position_bias import PositionBias

# Queries whose rows of the map exist at a time where a map is summed: B H 128 K floats, a few MB at common sizes.
_QUERY_BLOCK = 128


def biased_attention(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    value: Float[Array, "B K G e"],
    settings: Settings,
) -> tuple[Float[Array, "B Q H e"], Float[Array, "B H Q"]]:
    """Outputs and log-sum-exp. Softmax in float32; products in the input dtype with float32 accumulation."""
    batch, length, heads, _ = query.shape
    stacked, keys, bias = _stack(query * settings.scale, key), _heads_first(key), settings.bias
    bias = _stack_bias(bias.dense() if isinstance(bias, PositionBias) else bias, key)
    rows = jnp.arange(length) + key.shape[1] - length if settings.causal else None
    weights, total, peak = _exponentials(stacked, keys, settings.key_bias, bias, settings.softmax, rows)
    # Dividing after the product touches [S, d] numbers in place of [S, K].
    out = jnp.matmul(weights.astype(value.dtype), _heads_first(value), preferred_element_type=jnp.float32)
    out = (out / total).astype(query.dtype)
    lse = (peak + jnp.log(total)).reshape(batch, heads, length)
    return _heads_first(out.reshape(batch, heads, length, value.shape[-1])), lse


def attention_column_stats(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    settings: Settings,
    query_weight: Float[Array, "B Q"] | None,
    statistic: str,
    lse: Float[Array, "B H Q"] | None,
) -> Float[Array, "B H K"]:
    """Weighted column sums or maxima, `_QUERY_BLOCK` queries of the map at a time; it makes the log-sum-exp as it goes."""
    del lse
    batch, length, heads, _ = query.shape
    bias = settings.bias
    groups, columns = key.shape[2], key.shape[1]
    weight = jnp.ones((batch, length), jnp.float32) if query_weight is None else query_weight.astype(jnp.float32)
    keys = _heads_first(key)
    block = min(length, _QUERY_BLOCK)
    # Queries that fill up the last block have weight 0.
    pieces = {"query": _blocks(query * settings.scale, 1, block), "weight": _blocks(weight, 1, block)}
    pieces["place"] = _blocks(jnp.arange(length) + columns - length, 0, block)
    pieces |= _bias_pieces(bias, block)

    # Rows are computed again in the backward pass; otherwise the loop would keep the whole map.
    @jax.checkpoint
    def add(sums: Array, piece: dict[str, Array]) -> tuple[Array, None]:
        stacked, own_bias = _stack(piece["query"], key), _stack_bias(_piece_bias(piece, bias), key)
        rows = piece["place"] if settings.causal else None
        weights, total, _ = _exponentials(stacked, keys, settings.key_bias, own_bias, settings.softmax, rows)
        share = piece["weight"][:, None, None, :] / total.reshape(batch, groups, -1, block)
        weights = weights.reshape(*share.shape, columns)
        if statistic == "max":
            return jnp.maximum(sums, jnp.max(weights * share[..., None], axis=3)), None
        return sums + jnp.einsum("bgrqk,bgrq->bgrk", weights, share, precision=jax.lax.Precision.HIGHEST), None

    sums = jnp.zeros((batch, groups, heads // groups, columns), jnp.float32)
    if length <= block:
        sums, _ = add(sums, jax.tree.map(lambda leaf: leaf[0], pieces))
    else:
        sums, _ = jax.lax.scan(add, sums, pieces)
    return sums.reshape(batch, heads, columns)


def attention_score_excess(
    query: Float[Array, "B Q H d"],
    key: Float[Array, "B K G d"],
    *,
    threshold: float,
    bias: Float[Array, "b H Q K"] | PositionBias | None,
    scale: float,
    query_mask: Bool[Array, "B Q"] | None,
    key_mask: Bool[Array, "B K"] | None,
) -> Float[Array, " B"]:
    """Mean excess of the logits over `threshold`, `_QUERY_BLOCK` queries of the map at a time."""
    batch, length, heads, _ = query.shape
    query_weight, key_weight = (
        jnp.ones(x.shape[:2], jnp.float32) if mask is None else mask.astype(jnp.float32)
        for x, mask in ((query, query_mask), (key, key_mask))
    )
    keys = jnp.swapaxes(_heads_first(key), -1, -2)
    block = min(length, _QUERY_BLOCK)
    # Queries that fill up the last block have weight 0.
    pieces = {"query": _blocks(query * scale, 1, block), "weight": _blocks(query_weight, 1, block)}
    pieces |= _bias_pieces(bias, block)

    # Rows are computed again in the backward pass; otherwise the loop would keep the whole map.
    @jax.checkpoint
    def add(total: Array, piece: dict[str, Array]) -> tuple[Array, None]:
        logits = jnp.matmul(_stack(piece["query"], key), keys, preferred_element_type=jnp.float32)
        if bias is not None:
            logits += _stack_bias(_piece_bias(piece, bias), key).astype(jnp.float32)
        excess = jnp.maximum(logits, threshold) - threshold
        rows = jnp.sum(excess * key_weight[:, None, None, :], axis=-1).reshape(batch, heads, block)
        return total + jnp.sum(rows * piece["weight"][:, None, :], axis=(1, 2)), None

    total = jnp.zeros((batch,), jnp.float32)
    if length <= block:
        total, _ = add(total, jax.tree.map(lambda leaf: leaf[0], pieces))
    else:
        total, _ = jax.lax.scan(add, total, pieces)
    pairs = heads * jnp.sum(query_weight, axis=-1) * jnp.sum(key_weight, axis=-1)
    return total / jnp.maximum(pairs, 1.0)


def _exponentials(
    query: Float[Array, "B G S d"],
    key: Float[Array, "B G K d"],
    key_bias: Float[Array, "B K"] | None,
    bias: Float[Array, "b G S K"] | None,
    softmax: str,
    rows: Array | None,
) -> tuple[Float[Array, "B G S K"], Float[Array, "B G S 1"], Float[Array, "B G S 1"]]:
    """Attention before normalisation, what to divide by (never 0), and the peak of logits that it is relative to.

    `rows [Q]` is the last key that each query sees; None for all.
    """
    logits = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if key_bias is not None:
        logits += key_bias.astype(jnp.float32)[:, None, None, :]
    if rows is not None:
        rows = jnp.tile(rows, logits.shape[-2] // rows.shape[0])
        logits = jnp.where(jnp.arange(logits.shape[-1]) <= rows[:, None], logits, -jnp.inf)
    # The result does not depend on the peak, so no gradient flows through it. All is written with max alone, since a select
    # would break the one fusion that the CPU compiler makes of the products and the softmax.
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    if softmax == "off_by_one":
        peak = jnp.maximum(peak, 0.0)
        weights = jnp.exp(logits - peak)
        return weights, jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(-peak), peak
    # A row without keys has the peak -inf, and -inf - -inf would be nan. Its weights sum to 0; any other row has the peak
    # itself with weight 1, so that a floor under 1 touches no other row.
    weights = jnp.exp(logits - jnp.maximum(peak, jnp.finfo(jnp.float32).min))
    return weights, jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 0.5), peak


def _heads_first(x: Array) -> Array:
    """`[B, N, H, d]` to `[B, H, N, d]`, and back."""
    return jnp.swapaxes(x, 1, 2)


def _stack(query: Float[Array, "B Q H d"], key: Float[Array, "B K G d"]) -> Float[Array, "B G S d"]:
    batch, _, _, width = query.shape
    return _heads_first(query).reshape(batch, key.shape[2], -1, width)


def _stack_bias(bias: Float[Array, "b H Q K"] | None, key: Float[Array, "B K G d"]) -> Float[Array, "b G S K"] | None:
    return None if bias is None else bias.reshape(bias.shape[0], key.shape[2], -1, bias.shape[-1])


def _bias_pieces(bias: Array | PositionBias | None, block: int) -> dict[str, Array]:
    """What blocks of queries need of a bias."""
    if bias is None:
        return {}
    if isinstance(bias, PositionBias):
        return {"positions": _blocks(bias.query_positions, 1, block)}
    return {"bias": _blocks(bias, 2, block)}


def _piece_bias(piece: dict[str, Array], bias: Array | PositionBias | None) -> Float[Array, "b H q K"] | None:
    """The bias of a block of queries."""
    if isinstance(bias, PositionBias):
        return dataclasses.replace(bias, query_positions=piece["positions"]).dense()
    return piece.get("bias")


def _blocks(values: Array, axis: int, block: int) -> Array:
    """`axis` cut into pieces of length `block`, the last one padded with zeros; pieces lead."""
    pieces = -(-values.shape[axis] // block)
    widths = [(0, pieces * block - size if i == axis else 0) for i, size in enumerate(values.shape)]
    values = jnp.pad(values, widths).reshape(*values.shape[:axis], pieces, block, *values.shape[axis + 1 :])
    return jnp.moveaxis(values, axis, 0)
