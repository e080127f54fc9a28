# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching with the whole matrix of similarities in float32; what every implementation is compared with.

Shapes: B batch, A left rows, K right rows, C channels, S statistics a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Below this squared norm a vector counts as zero.
TINY = 1e-24


def similarity(left: Float[Array, "B A C"], right: Float[Array, "B K C"], metric: str) -> Float[Array, "B A K"]:
    """All similarities."""
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    if metric == "cosine":
        left, right = unit(left), unit(right)
    scores = jnp.einsum("bac,bkc->bak", left, right, precision=jax.lax.Precision.HIGHEST)
    if metric == "distance":
        return 2 * scores - square(right)[:, None] - square(left)[..., None]
    return scores


def square(rows: Float[Array, "B A C"]) -> Float[Array, "B A"]:
    """Squared norms."""
    return jnp.sum(rows * rows, axis=-1)


def unit(rows: Float[Array, "B A C"]) -> Float[Array, "B A C"]:
    """Rows of norm 1; a zero row stays zero, where a division would give nan."""
    return rows * jax.lax.rsqrt(jnp.maximum(square(rows), TINY))[..., None]


def bipartite_match(
    left: Float[Array, "B A C"], right: Float[Array, "B K C"], bias: Float[Array, "B K"], *, metric: str, statistic: str
) -> tuple[Float[Array, "B A S"], Int[Array, "B A S"]]:
    """The statistic of the whole matrix."""
    scores = similarity(left, right, metric) + bias[:, None, :]
    if statistic == "sum":
        total = jnp.sum(jnp.where(jnp.isneginf(scores), 0, scores), axis=-1, keepdims=True)
        return total, jnp.zeros(total.shape, jnp.int32)
    value, index = jax.lax.top_k(scores, 2 if statistic == "best_two" else 1)
    return value, jnp.where(jnp.isneginf(value), 0, index).astype(jnp.int32)
