# SPDX-License-Identifier: Apache-2.0
"""Token Cropr: pruning by learned queries, which an auxiliary head trains to gather what the task needs.

The queries and the head live in `layers.cropr`; here is what they compute.

Shapes: B batch, N tokens, Q queries, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptive import budgets
from adaptive.reduction import select
from adaptive.registry import register
from adaptive.tokens import Reduction, Signals, TokenSet

_HIGHEST = jax.lax.Precision.HIGHEST


@register(
    "cropr",
    kind="reduction",
    paper="Token Cropr: Faster ViTs for Quite a Few Tasks",
    citation="Bergner, Lippert, Mahendran. CVPR 2025. arXiv:2412.00965",
    signals=("gate_logits",),
    trained="yes",
)
def cropr(tokens: TokenSet, signals: Signals, budget: budgets.Budget) -> Reduction:
    """Keeps the tokens that the queries of an auxiliary head look for, in order; the others are put aside.

    Args:
      tokens: `[B, N, D]`.
      signals: `gate_logits [B, N]`, of `scores`; `layers.cropr.Cropr` hands them over.
      budget: surviving tokens, the class token included.

    Source: Bergner et al. 2025; top-k by the summed logits of the queries.

    Differs: kept tokens stay in their order, where the public code leaves them sorted by score.
    """
    return select.prune(signals.gate_logits, tokens, signals, budget)


def scores(features: Float[Array, "B N D"], queries: Float[Array, "Q D"]) -> Float[Array, "B N"]:
    """Logits `[B, N]` of all queries summed: one product with their sum, in float32.

    Source: Bergner et al. 2025; without the `D ** -0.5` of the softmax, which does not change the order.
    """
    total = jnp.sum(queries.astype(jnp.float32), axis=0)
    return jnp.einsum("bnd,d->bn", features.astype(jnp.float32), total, precision=_HIGHEST)


def gather(
    features: Float[Array, "B N D"], queries: Float[Array, "Q D"], valid: Bool[Array, "B N"]
) -> Float[Array, "B Q D"]:
    """What each query gathers for the auxiliary head: `softmax(q x^T / sqrt(D)) x`, in float32.

    No gradient reaches the features, so that the auxiliary loss trains queries and head alone.

    Source: Bergner et al. 2025, the aggregator.
    """
    # Padding has a weight of 0, which must not meet a number that is not finite.
    features = jnp.where(valid[..., None], jax.lax.stop_gradient(features).astype(jnp.float32), 0.0)
    logits = jnp.einsum("qd,bnd->bqn", queries.astype(jnp.float32), features, precision=_HIGHEST)
    logits = jnp.where(valid[:, None, :], logits * features.shape[-1] ** -0.5, -jnp.inf)
    return jnp.einsum("bqn,bnd->bqd", jax.nn.softmax(logits, axis=-1), features, precision=_HIGHEST)
