# SPDX-License-Identifier: Apache-2.0
"""Compaction and expansion as products with the 0/1 matrix that they are; what every implementation is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EXACT = jax.lax.Precision.HIGHEST


def compact(values: Float[Array, "B N D"], place: Int[Array, "B N"], capacity: int) -> Float[Array, "B M D"]:
    """`P @ values` with `P[m, n] = (place[n] == m)`."""
    return jnp.einsum("bnm,bnd->bmd", jax.nn.one_hot(place, capacity), values, precision=_EXACT)


def expand(values: Float[Array, "B M D"], place: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """`P.T @ values`."""
    return jnp.einsum("bnm,bmd->bnd", jax.nn.one_hot(place, values.shape[1]), values, precision=_EXACT)
