# SPDX-License-Identifier: Apache-2.0
"""Matchers: which tokens are alike enough to become one.

Shapes: B batch, N tokens, A and K the two sides of a bipartite split, C channels of the metric.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive.tokens import Signals, TokenSet
from pallas_kernels.bipartite_match import bipartite_match

# A real token that has only padding to join is the last to go.
_ALONE = -1e30


def unprotected(tokens: TokenSet, signals: Signals) -> Bool[Array, "B N"]:
    """True for the real tokens that may join others and be joined: all but the class token."""
    return tokens.valid.at[:, 0].set(False) if signals.cls_token else tokens.valid


def best_partner(
    metric: Float[Array, "B N C"], mass: Float[Array, "B N"]
) -> tuple[Float[Array, "B A"], Int[Array, "B A"]]:
    """The most similar odd token (cosine) of every even token, and the similarity.

    Args:
      metric: `[B, N, C]`; no gradient flows through the matching.
      mass: `[B, N]`, 0 in padding.

    Returns:
      `(similarity [B, A], partner [B, A])` with A = ceil(N/2) even tokens; `partner` counts odd tokens: token 2 partner + 1.

    Source: Bolya et al. 2023 (ToMe), section 3 and appendix D. Padding is our addition.
    """
    bias = jnp.where(mass[:, 1::2] > 0, 0.0, _ALONE)
    similarity, partner = bipartite_match(metric[:, ::2], metric[:, 1::2], bias=bias, metric="cosine")
    return similarity[..., 0], partner[..., 0]


def nearest_slot(
    metric: Float[Array, "B N C"], slots: Int[Array, "B M"], *, cls_token: bool
) -> tuple[Float[Array, "B N"], Int[Array, "B N"]]:
    """The slot with the most similar head (cosine) for every token, and the similarity.

    Args:
      metric: `[B, N, C]`; no gradient flows through the matching.
      slots: `[B, M]` token that heads each slot; -1 where none does, and nothing is matched to that slot.
      cls_token: nothing is matched to slot 0.

    Returns:
      `(similarity [B, N], slot [B, N])`; -inf and 0 where no slot is left.
    """
    heads = jnp.take_along_axis(metric, jnp.maximum(slots, 0)[..., None], axis=1)
    bias = jnp.where(slots >= 0, 0.0, -jnp.inf)
    bias = bias.at[:, 0].set(-jnp.inf) if cls_token else bias
    similarity, slot = bipartite_match(metric, heads, bias=bias, metric="cosine")
    return similarity[..., 0], slot[..., 0]
