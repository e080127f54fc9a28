# SPDX-License-Identifier: Apache-2.0
"""Merging and restoring as products with the whole matrix; what every implementation is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EXACT = jax.lax.Precision.HIGHEST


def merge(
    values: Float[Array, "B N D"], assign: Int[Array, "B N"], weight: Float[Array, "B N"], slots: int
) -> Float[Array, "B M D"]:
    """`matrix @ values` with `matrix[m, n] = (assign[n] == m) weight[n]`."""
    matrix = jax.nn.one_hot(assign, slots, axis=1) * weight[:, None, :]
    return jnp.einsum("bmn,bnd->bmd", matrix, values.astype(jnp.float32), precision=_EXACT).astype(values.dtype)


def restore(values: Float[Array, "B M D"], assign: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """`matrix.T @ values` with weights of 1."""
    matrix = jax.nn.one_hot(assign, values.shape[1], axis=1)
    return jnp.einsum("bmn,bmd->bnd", matrix, values.astype(jnp.float32), precision=_EXACT).astype(values.dtype)
