# SPDX-License-Identifier: Apache-2.0
"""Matchers: which tokens are alike enough to become one.

Shapes: B batch, N tokens, A and K the two sides of a bipartite split, C channels of the metric.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pallas_kernels.bipartite_match import bipartite_match

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
    bias = jnp.where(valid[:, 1::2], 0.0, _ALONE)
    similarity, partner = bipartite_match(metric[:, ::2], metric[:, 1::2], bias=bias, metric="cosine")
    similarity = jnp.where(valid[:, ::2], similarity[..., 0], _PADDING)
    partner = jnp.where(valid[:, ::2], partner[..., 0], 0)
    if cls_token:
        similarity, partner = similarity.at[:, 0].set(-jnp.inf), partner.at[:, 0].set(0)
    return similarity, partner
