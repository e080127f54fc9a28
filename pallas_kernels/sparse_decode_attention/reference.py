# SPDX-License-Identifier: Apache-2.0
"""Sparse decoding by gathering every listed slot, in float32; what every implementation is compared with.

Shapes: B batch, T query rows, H heads, G key heads, d head width, P pages, S slots of a page, L pages listed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EXACT = jax.lax.Precision.HIGHEST


def sparse_decode_attention(
    query: Float[Array, "B T H d"],
    key_pages: Float[Array, "*b G P S d"],
    value_pages: Float[Array, "*b G P S d"],
    pages: Int[Array, "B G L"],
    lengths: Int[Array, "B G"],
    *,
    bias: Float[Array, "*b G P S"] | None,
    sinks: Float[Array, " H"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Dense attention over `[L S]` gathered slots, those past the length masked."""
    (batch, rows, heads, width), (groups, _, slots, _) = query.shape, key_pages.shape[-4:]
    own = key_pages.ndim == 5
    listed = gather(key_pages, pages, own), gather(value_pages, pages, own)
    keys, values = (array.astype(jnp.float32).reshape(batch, groups, -1, width) for array in listed)
    stacked = query.astype(jnp.float32).reshape(batch, rows, groups, -1, width)
    logits = jnp.einsum("btgrd,bgkd->btgrk", stacked, keys, precision=_EXACT) * scale
    if bias is not None:
        logits += gather(bias, pages, own).reshape(batch, 1, groups, 1, -1)
    live = jnp.arange(pages.shape[2] * slots) < lengths[..., None]
    logits = jnp.where(live[:, None, :, None], logits, -jnp.inf).reshape(batch, rows, heads, -1)
    sink = jnp.full((heads,), -jnp.inf) if sinks is None else sinks
    sink = jnp.broadcast_to(sink[:, None], (batch, rows, heads, 1))
    lse = jax.nn.logsumexp(jnp.concatenate([logits, sink], axis=-1), axis=-1)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])
    weights = weights.reshape(batch, rows, groups, -1, weights.shape[-1])
    out = jnp.einsum("btgrk,bgkd->btgrd", weights, values, precision=_EXACT)
    return out.reshape(query.shape).astype(query.dtype), lse


def gather(pool: Float[Array, "*b G P S ..."], pages: Int[Array, "B g L"], own: bool) -> Float[Array, "B G L S ..."]:
    """The listed pages, of each row's own when `own`, else of a pool; what is listed past a length may be any number."""
    groups, there = pool.shape[own : own + 2]
    pages = jnp.clip(jnp.broadcast_to(pages, (pages.shape[0], groups, pages.shape[2])), 0, there - 1)
    heads = jnp.arange(groups)[:, None]
    return pool[jnp.arange(pages.shape[0])[:, None, None], heads, pages] if own else pool[heads, pages]
