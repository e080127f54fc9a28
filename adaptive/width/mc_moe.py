# SPDX-License-Identifier: Apache-2.0
"""MC-MoE's online dynamic pruning: a token keeps its second expert only where that one weighs enough, or the token matters.

Shapes: B batch, N tokens, D features, K experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import ragged
from adaptive.registry import register
from adaptive.tokens import Signals, TokenSet


@register(
    "mc_moe",
    kind="width",
    paper="MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More",
    citation="Huang et al. 2025, ICLR, arXiv:2410.06270",
    signals=("choice_logits", "column_sums"),
)
def mc_moe(
    tokens: TokenSet,
    signals: Signals,
    *,
    ratio: float = 0.5,
    protected: float = 0.02,
    dropped: float = 0.0,
    causal: bool = False,
) -> Float[Array, "B N K"]:
    """The experts of each token, at most two, `[B, N, K]` of 0 and 1; none in padding.

    The second expert goes where its weight is below `ratio` times that of the first, unless the token is among the most
    important. The block renormalises the weights of those that are left.

    Args:
      tokens: the token set, whose features are the block's inputs.
      signals: `choice_logits [B, N, K]` of the router, and `column_sums [B, N]`, the attention that each token receives.
      ratio: 0 drops nothing; `median_ratio` is the paper's choice. protected: share of tokens that keep both experts.
      dropped: share of the least important tokens that lose both.
      causal: later queries alone see a token.

    Raises:
      ValueError: shares outside [0, 1], or that overlap.

    Source: Huang et al. 2025 (online dynamic pruning).

    Differs: the public code sums attention over keys, so that its importance is the norm of the token alone.
    """
    if min(protected, dropped) < 0 or protected + dropped > 1:
        raise ValueError(f"protected and dropped are shares that add up to at most 1; got {protected} and {dropped}")
    weights = jax.nn.softmax(signals.choice_logits.astype(jnp.float32))
    place = _place(weights)
    first, second = (jnp.sum(weights * (place == rank), axis=-1) for rank in (0, 1))
    rank = ragged.rank(jnp.where(tokens.valid, importance(tokens, signals.column_sums, causal=causal), -jnp.inf))
    both = (second >= ratio * first) | (rank < jnp.round(protected * tokens.count[:, None]))
    some = tokens.valid & (rank < jnp.round((1 - dropped) * tokens.count[:, None]))
    runs = (place == 0) | ((place == 1) & both[..., None])
    return jnp.where(runs & some[..., None], 1.0, 0.0)


def _place(weights: Float[Array, "B N K"]) -> Array:
    """Place of each expert by falling weight."""
    order = jnp.argsort(-weights, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True)


def importance(tokens: TokenSet, column_sums: Float[Array, "B N"], *, causal: bool = False) -> Float[Array, "B N"]:
    """Norm of a token times the mean attention that it receives from the queries that can see it.

    Source: Huang et al. 2025 (importance of tokens).
    """
    seen_by = tokens.count[:, None].astype(jnp.float32)
    if causal:
        seen_by -= jnp.cumsum(tokens.valid, axis=-1) - 1
    norm = jnp.sum(jnp.abs(tokens.features.astype(jnp.float32)), axis=-1)
    return norm * column_sums / jnp.maximum(seen_by, 1.0)


def median_ratio(logits: Float[Array, "B N K"], valid: Bool[Array, "B N"]) -> Float[Array, ""]:
    """Median over real tokens of the second expert's weight over the first's, the threshold of a layer."""
    best = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), 2)[0]
    return jnp.nanmedian(jnp.where(valid, best[..., 1] / best[..., 0], jnp.nan))
