# SPDX-License-Identifier: Apache-2.0
"""Compaction and expansion as gathers in plain JAX.

Shapes: B batch, N tokens, M slots, D features.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int


def compact(values: Array, source: Int[Array, "B M"], place: Int[Array, "B N"]) -> Array:
    """Rows `source` of `values [B, N, D]`; -1 gives zeros."""
    del place
    return _rows(values, source)


def expand(values: Array, source: Int[Array, "B M"], place: Int[Array, "B N"]) -> Array:
    """Rows `place` of `values [B, M, D]`; -1 gives zeros."""
    del source
    return _rows(values, place)


def _rows(values: Array, index: Array) -> Array:
    rows = jnp.take_along_axis(values, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where(index[..., None] >= 0, rows, jnp.zeros((), values.dtype))
