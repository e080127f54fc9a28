# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding in plain JAX: a loop over blocks of listed pages that ends with the longest list.

Shapes: B batch, T query rows, H heads, G key heads, R = T H / G rows that share keys, d head width, P pages, S slots of a page,
L pages listed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_decode_attention.reference import gather

# Slots gathered at a time: enough for one good product, few enough that a short list pays for little.
_SLOTS = 512


def sparse_decode_attention(
    query: Float[Array, "B T H d"],
    key_pages: Float[Array, "*b G P S d"],
    value_pages: Float[Array, "*b G P S d"],
    pages: Int[Array, "B g L"],
    lengths: Int[Array, "B g"],
    *,
    bias: Float[Array, "*b G P S"] | None,
    sinks: Float[Array, " H"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Online softmax in float32 over blocks of pages."""
    (groups, _, slots, width), own = key_pages.shape[-4:], key_pages.ndim == 5
    batch = query.shape[0]
    many = max(min(_SLOTS // slots, pages.shape[2]), 1)
    pages = jnp.pad(pages, ((0, 0), (0, 0), (0, -pages.shape[2] % many)))
    stacked = stack(query, groups) * jnp.asarray(scale, query.dtype)
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    # The loop is handed tokens and sees them as pages inside: XLA copies a cache that was just written to if it is handed over
    # in another shape.
    pools = [pool.reshape(*pool.shape[:-3], -1, width) for pool in (key_pages, value_pages)]

    def step(index: Array, state: tuple) -> tuple:
        peak, total, out = state
        listed = jax.lax.dynamic_slice_in_dim(pages, index * many, many, axis=2)
        keys, values = (
            gather(pool.reshape(key_pages.shape), listed, own).reshape(batch, groups, -1, width) for pool in pools
        )
        options = {"precision": precision, "preferred_element_type": jnp.float32}
        logits = jnp.einsum("bgrd,bgkd->bgrk", stacked, keys, **options)
        if bias is not None:
            logits += gather(bias, listed, own).reshape(batch, groups, 1, -1).astype(jnp.float32)
        live = index * many * slots + jnp.arange(many * slots) < lengths[..., None]
        logits = jnp.where(live[:, :, None], logits, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1, keepdims=True))
        # Without any key so far the peak is -inf, and -inf less -inf is nan.
        safe = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
        weights, kept = jnp.exp(logits - safe), jnp.exp(peak - safe)
        values = jnp.where(live[..., None], values, 0)
        added = jnp.einsum("bgrk,bgkd->bgrd", weights.astype(values.dtype), values, **options)
        return new_peak, total * kept + jnp.sum(weights, axis=-1, keepdims=True), out * kept + added

    peak, total = start(sinks, stacked.shape)
    state = (peak, total, jnp.zeros(stacked.shape, jnp.float32))
    trips = -(-jnp.max(lengths) // (many * slots))
    peak, total, out = jax.lax.fori_loop(0, trips, step, state)
    out = out / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return unstack(out, query.shape).astype(query.dtype), unstack(lse, (*query.shape[:3], 1))[..., 0]


def stack(query: Float[Array, "B T H d"], groups: int) -> Float[Array, "B G R d"]:
    """Rows that share a key head together."""
    batch, rows, _, width = query.shape
    return jnp.moveaxis(query.reshape(batch, rows, groups, -1, width), 2, 1).reshape(batch, groups, -1, width)


def unstack(rows: Float[Array, "B G R d"], shape: tuple[int, ...]) -> Float[Array, "B T H d"]:
    """The inverse of `stack`."""
    batch, groups = rows.shape[:2]
    return jnp.moveaxis(rows.reshape(batch, groups, shape[1], -1, shape[3]), 1, 2).reshape(shape)


def start(sinks: Float[Array, " H"] | None, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Peak and total `[B, G, R, 1]` before any key: a sink is a key without a value."""
    batch, groups, rows, _ = shape
    if sinks is None:
        return jnp.full((batch, groups, rows, 1), -jnp.inf), jnp.zeros((batch, groups, rows, 1))
    own = sinks.astype(jnp.float32).reshape(groups, 1, -1)
    own = jnp.broadcast_to(own, (groups, rows // own.shape[2], own.shape[2])).reshape(1, groups, rows, 1)
    peak = jnp.broadcast_to(own, (batch, groups, rows, 1))
    return peak, jnp.where(jnp.isneginf(peak), 0.0, 1.0)
