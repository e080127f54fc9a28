# SPDX-License-Identifier: Apache-2.0
"""Pruning by one score, the baselines without a score, and pruning that fuses what it drops."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adaptive import budgets, ragged
from adaptive.reduction import combine, select
from adaptive.registry import register
from adaptive.tokens import Reduction, Signals, TokenSet


@register("identity", kind="reduction")
def identity(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Keeps every token, whatever the budget: the dense baseline in any table.

    Differs: the number of slots is N, not the budget.
    """
    del signals, budget
    return Reduction.identity(*tokens.features.shape[:2])


@register("random", kind="reduction", signals=("rng",))
def random(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Keeps a uniformly drawn subset, in order. Every row draws its own.

    A threshold keeps each token whose draw in (0, 1) exceeds its value.
    """
    return select.prune(jax.random.uniform(signals.rng, tokens.mass.shape), tokens, signals, budget)


@register("truncate", kind="reduction")
def truncate(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Keeps the first tokens and cuts the rest. A threshold keeps the tokens whose share of the length left exceeds it."""
    length = tokens.mass.shape[1]
    return select.prune(jnp.broadcast_to(1.0 - jnp.arange(length) / length, tokens.mass.shape), tokens, signals, budget)


@register("stride", kind="reduction")
def stride(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Keeps evenly spaced tokens of each row's real ones. A threshold has no meaning here beyond its cap."""
    slots = budgets.capacity(budget)
    protected = int(signals.cls_token)
    place = jnp.cumsum(tokens.valid, axis=-1) - 1 - protected
    spread = jnp.maximum(tokens.count[:, None] - protected, 1)
    free = max(slots - protected, 0)
    # Token i of n starts a new one of `free` equal steps when floor(i f / n) rises there.
    starts = (place * free) // spread > ((place - 1) * free) // spread
    starts |= (spread <= free) | (place < 0)
    return select.prune(starts.astype(jnp.float32), tokens, signals, slots)


@register("class_attention", kind="reduction", signals=("cls_attention",), trained="optional")
def class_attention(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Keeps the tokens that the class token attends to most, in order; the others are dropped.

    Args:
      tokens: `[B, N, D]`.
      signals: `cls_attention [B, N]`, averaged over heads.
      budget: surviving tokens, the class token included.

    Source: the selection of Liang et al. 2022 (EViT), without its fused token.
    """
    return select.prune(signals.cls_attention, tokens, signals, budget)


@register(
    "evit",
    kind="reduction",
    paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    citation="Liang, Ge, Tong, Song, Wang, Xie. ICLR 2022. arXiv:2202.07800",
    signals=("cls_attention",),
    trained="optional",
)
def evit(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Keeps the tokens that the class token attends to most and fuses the others into one, weighted by that attention.

    Args:
      tokens: `[B, N, D]`.
      signals: `cls_attention [B, N]`.
      budget: surviving tokens; the last slot is the fused one (index -1), the others are kept tokens in order.

    Raises:
      ValueError: a budget under 2 leaves no room for a kept token beside the fused one.

    Source: Liang et al. 2022, section 3.2.

    Differs: the fused token is the attention-weighted mean of the inattentive tokens (weights normalised to 1), and kept
    tokens stay in their original order.
    """
    slots = budgets.capacity(budget)
    if slots < 2:
        raise ValueError(f"evit needs a budget of at least 2 (one kept and one fused token); got {slots}")
    room = budgets.Threshold(budget.value, slots - 1) if isinstance(budget, budgets.Threshold) else slots - 1
    keep = select.survivors(signals.cls_attention, tokens, signals, room)
    kept = ragged.compact(keep, slots - 1, overflow="checked")
    heads = jnp.pad(kept.slots, ((0, 0), (0, 1)), constant_values=-1)
    assign = jnp.where(tokens.valid & ~keep, slots - 1, kept.assign)
    # Attention of exactly 0 to every dropped token must not leave an empty slot with mass.
    attention = jnp.maximum(signals.cls_attention.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)
    return combine.weighted_mean(heads, assign, jnp.where(keep, 1.0, attention))
