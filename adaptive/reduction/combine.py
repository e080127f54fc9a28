# SPDX-License-Identifier: Apache-2.0
"""Combiners: from who joins which slot to the coefficients of the linear map.

Shapes: B batch, N tokens, M slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive.tokens import DenseReduction, Reduction


def weighted_mean(slots: Int[Array, "B M"], assign: Int[Array, "B N"], share: Float[Array, "B N"]) -> Reduction:
    """Each slot is the mean of its tokens weighted by `share [B, N]` (mass: ToMe's average; ones: a plain mean).

    A slot whose tokens have no share at all is zero.
    """
    share = jnp.where(assign >= 0, share, 0.0).astype(jnp.float32)
    support = jax.nn.one_hot(assign, slots.shape[1], axis=1, dtype=jnp.float32)
    total = jnp.einsum("bmn,bn->bm", support, share, precision=jax.lax.Precision.HIGHEST)
    own_total = jnp.take_along_axis(total, jnp.maximum(assign, 0), axis=1)
    return Reduction(slots, assign, share / jnp.where(own_total > 0, own_total, 1.0), merges=True)


def transform(affinity: Float[Array, "B M N"], weight: Float[Array, "B N"] | None = None) -> DenseReduction:
    """Every slot is the mean of all tokens weighted by `affinity [B, M, N] * weight [B, N]`: the general, many-to-many form.

    As a matrix `diag(A w)^-1 A diag(w)`. Pruning is an A of rows of the identity; a merge an A whose columns hold one 1, with
    the mass as w (ToMe) or without (a plain mean). Mass divides over the slots as the columns of A do. A row of zeros is an
    empty slot, a column of zeros a dropped token.

    Args:
      affinity: A, non-negative.
      weight: w, non-negative; ones when None.

    Source: Zeng et al. 2025 (Token Transforming), the form `Y = W X`; Han et al. 2024 (FiCoCo), the same for its operator.
    """
    affinity = affinity.astype(jnp.float32)
    columns = jnp.sum(affinity, axis=1, keepdims=True)
    weighted = affinity if weight is None else affinity * weight.astype(jnp.float32)[:, None, :]
    rows = jnp.sum(weighted, axis=2, keepdims=True)
    return DenseReduction(
        weighted / jnp.where(rows > 0, rows, 1.0), share_=affinity / jnp.where(columns > 0, columns, 1.0)
    )
