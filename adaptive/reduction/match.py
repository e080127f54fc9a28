# SPDX-License-Identifier: Apache-2.0
"""Matchers: which tokens are alike enough to become one.

Shapes: B batch, N tokens, A and K the two sides of a bipartite split, C channels of the metric.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Padding joins anything, so that it is the first to go; a real token that has only padding to join is the last.
_PADDING, _ALONE = 1e20, -1e30


def best_partner(
    metric: Float[Array, "B N C"], valid: Bool[Array, "B N"], *, cls_token: bool
) -> tuple[Float[Array, "B A"], Int[Array, "B A"]]:
    """The most similar odd token (cosine) of every even token, and the similarity.

    Args:
      metric: `[B, N, C]`; no gradient flows through the matching.
      valid: `[B, N]`.
      cls_token: token 0 is never matched.

    Returns:
      `(similarity [B, A], partner [B, A])` with A = ceil(N/2) even tokens; `partner` counts odd tokens: token 2 partner + 1.
      The similarity of padding is above any other.

    Source: Bolya et al. 2023 (ToMe), section 3 and appendix D. Padding is our addition.
    """
    metric = jax.lax.stop_gradient(metric.astype(jnp.float32))
    # A zero vector is similar to nothing; dividing it by its norm would give nan.
    metric *= jax.lax.rsqrt(jnp.maximum(jnp.sum(metric * metric, axis=-1, keepdims=True), 1e-24))
    scores = jnp.einsum("bac,bkc->bak", metric[:, ::2], metric[:, 1::2], precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where(valid[:, None, 1::2], scores, _ALONE)
    scores = jnp.where(valid[:, ::2, None], scores, _PADDING)
    if cls_token:
        scores = scores.at[:, 0, :].set(-jnp.inf)
    return jnp.max(scores, axis=-1), jnp.argmax(scores, axis=-1).astype(jnp.int32)
