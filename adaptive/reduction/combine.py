# SPDX-License-Identifier: Apache-2.0
"""Combiners: from who joins which slot to the coefficients of the linear map.

Shapes: B batch, N tokens, M slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive.tokens import Reduction


def weighted_mean(slots: Int[Array, "B M"], assign: Int[Array, "B N"], share: Float[Array, "B N"]) -> Reduction:
    """Each slot is the mean of its tokens weighted by `share [B, N]` (mass: ToMe's average; ones: a plain mean).

    A slot whose tokens have no share at all is zero.
    """
    share = jnp.where(assign >= 0, share, 0.0).astype(jnp.float32)
    support = jax.nn.one_hot(assign, slots.shape[1], axis=1, dtype=jnp.float32)
    total = jnp.einsum("bmn,bn->bm", support, share, precision=jax.lax.Precision.HIGHEST)
    own_total = jnp.take_along_axis(total, jnp.maximum(assign, 0), axis=1)
    return Reduction(slots, assign, share / jnp.where(own_total > 0, own_total, 1.0), merges=True)
