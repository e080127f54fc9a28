# SPDX-License-Identifier: Apache-2.0
"""Selectors: from scores and a budget to the tokens that survive.

Shapes: B batch, N tokens, M slots.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import budgets, ragged
from adaptive.tokens import Reduction, Signals, TokenSet


def guard(scores: Float[Array, "B N"], tokens: TokenSet, signals: Signals) -> Float[Array, "B N"]:
    """`scores` in float32 with the class token above all others and padding below all others."""
    scores = jnp.where(tokens.valid, scores.astype(jnp.float32), -jnp.inf)
    return scores.at[:, 0].set(jnp.inf) if signals.cls_token else scores


def survivors(
    scores: Float[Array, "B N"], tokens: TokenSet, signals: Signals, budget: budgets.Budget
) -> Bool[Array, "B N"]:
    """`[B, N]` True for the tokens with the highest scores under the budget; ties go to the lower index.

    A row with fewer real tokens than the budget keeps all of them. Under a threshold a row keeps at least its best token.
    """
    scores = guard(scores, tokens, signals)
    place = ragged.rank(scores)
    keep = (place < budgets.capacity(budget)) & tokens.valid
    if isinstance(budget, budgets.Threshold):
        keep &= (scores > budget.value) | (place == 0)
    return keep


def prune(scores: Float[Array, "B N"], tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Keeps the highest scores under the budget, in their original order; the others are dropped."""
    keep = survivors(scores, tokens, signals, budget)
    return ragged.compact(keep, budgets.capacity(budget), overflow="checked")
