# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention written plainly in float32 with the dense mask; what every implementation is compared with.

Shapes: B batch, N queries, L keys, H heads, G key heads, d head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention.index import BlockIndex


def block_sparse_attention(
    query: Float[Array, "B N H d"],
    key: Float[Array, "B L G d"],
    value: Float[Array, "B L G d"],
    index: BlockIndex,
    *,
    key_bias: Float[Array, "B L"] | None = None,
    causal: bool = False,
    sinks: Float[Array, " H"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B N H d"], Float[Array, "B H N"]]:
    """The output in the dtype of `query`, and the log of the softmax denominator, -inf for a row with nothing in it."""
    heads, width = query.shape[2:]
    scale = width**-0.5 if scale is None else scale
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2).astype(jnp.float32) for x in (key, value))
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bnhd,blhd->bhnl", query.astype(jnp.float32), key, precision=exact) * scale
    if key_bias is not None:
        logits += key_bias.astype(jnp.float32)[:, None, None, :]
    mask = index.token_mask()
    mask = jnp.repeat(mask, heads // mask.shape[1], axis=1)
    if causal:
        rows, columns = logits.shape[-2:]
        mask &= jnp.tri(rows, columns, columns - rows, dtype=bool)
    logits = jnp.where(mask, logits, -jnp.inf)
    if sinks is not None:
        rest = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, rest], axis=-1)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    share = (weights / jnp.where(some, total, 1.0))[..., : key.shape[1]]
    out = jnp.einsum("bhnl,blhd->bnhd", share, value, precision=exact).astype(query.dtype)
    lse = jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + peak, -jnp.inf)
    return out, lse[..., 0]
