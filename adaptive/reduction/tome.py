# SPDX-License-Identifier: Apache-2.0
"""Token Merging: bipartite soft matching, mass-weighted."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive import budgets, ragged
from adaptive.reduction import combine, match
from adaptive.registry import register
from adaptive.tokens import Reduction, Signals, TokenSet


@register(
    "tome",
    kind="reduction",
    paper="Token Merging: Your ViT But Faster",
    citation="Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman. ICLR 2023. arXiv:2210.09461",
    signals=("keys",),
    trained="optional",
    removes_half=True,
)
def tome(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Merges the most similar pairs of an even and an odd token until the budget is met.

    Every even token finds its most similar odd token by the cosine of their attention keys; the r most similar even tokens
    join their partners, and each slot is the mean of its tokens weighted by mass. Slots are the unmerged even tokens, then
    all odd tokens; with a class token (which never merges) the unmerged stay in order, else they stand by falling similarity,
    as the next layer's split depends on it.

    Args:
      tokens: `[B, N, D]`.
      signals: `keys [B, N, C]`, `cls_token`.
      budget: surviving tokens, at least half of the unprotected ones. With a `Threshold(value, cap)`, `N - cap` pairs merge in
        any case and more where the cosine exceeds `value`; slots left over are padding.

    Source: Bolya et al. 2023, section 3 and appendix D (`bipartite_soft_matching`, `merge_wavg` of the public code).

    Differs: asking for more merges than half of the tokens is an error here, and clamped there; no distillation token; the
    threshold form is ours.
    """
    similarity, partner = match.best_partner(signals.keys, tokens.valid, cls_token=signals.cls_token)
    even, odd = similarity.shape[1], tokens.features.shape[1] // 2
    removed = even + odd - budgets.capacity(budget)
    place = ragged.rank(similarity)
    merged = place < removed
    if isinstance(budget, budgets.Threshold):
        merged |= similarity > budget.value
    # Where the unmerged even tokens go: by index with a class token, so that it stays first; by similarity without.
    position = _prefix_place(~merged) if signals.cls_token else place - jnp.sum(merged, axis=-1, keepdims=True)
    unmerged = jnp.sum(~merged, axis=-1, keepdims=True, dtype=jnp.int32)
    odd_slots = jnp.broadcast_to(unmerged + jnp.arange(odd, dtype=jnp.int32), (merged.shape[0], odd))
    even_slots = jnp.where(merged, jnp.take_along_axis(odd_slots, partner, axis=1), position)
    head = _interleave(jnp.where(merged, -1, position), odd_slots)
    return combine.weighted_mean(_heads(head, even + odd - removed), _interleave(even_slots, odd_slots), tokens.mass)


def _prefix_place(keep: Array) -> Int[Array, "B A"]:
    """Place of each kept token among the kept ones."""
    return jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - 1


def _interleave(even: Array, odd: Array) -> Array:
    """`[B, N]` from the values at even and at odd tokens (one even token more when N is odd)."""
    padded = jnp.pad(odd, ((0, 0), (0, even.shape[1] - odd.shape[1])))
    return jnp.stack([even, padded], axis=-1).reshape(even.shape[0], -1)[:, : even.shape[1] + odd.shape[1]]


def _heads(slot: Float[Array, "B N"], slots: int) -> Int[Array, "B M"]:
    """`[B, M]` token that heads each slot, from the slot `[B, N]` that each token heads (-1: none)."""
    length = slot.shape[1]
    # Tokens sorted by the slot they head; those that head none go last.
    order = jnp.argsort(jnp.where(slot >= 0, slot, length), axis=-1)[:, :slots].astype(jnp.int32)
    headed = jnp.sum(slot >= 0, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(slots) < headed, order, -1)
