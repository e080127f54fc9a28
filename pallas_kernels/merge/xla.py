# SPDX-License-Identifier: Apache-2.0
"""Merging by a sum over segments (on a TPU, which scatters row by row, by a product), restoring by a gather, in plain JAX.

Shapes: B batch, N tokens, M slots, D features.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.merge import reference


def merge(
    values: Float[Array, "B N D"],
    assign: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    slots: int,
    odd_last: bool = False,
    in_order: bool = False,
) -> Float[Array, "B M D"]:
    """Every token is added to its slot: N D multiply-adds, where the product with the matrix takes M N D.

    Neither `odd_last` nor `in_order` saves anything here.
    """
    product = functools.partial(reference.merge, slots=slots)
    segments = functools.partial(_segments, slots=slots)
    return jax.lax.platform_dependent(values, assign, weight, tpu=product, default=segments)


def _segments(values: Array, assign: Array, weight: Array, slots: int) -> Array:
    def one(values: Array, assign: Array, weight: Array) -> Array:
        # Tokens that join no slot aim past the end and are dropped.
        place = jnp.where(assign >= 0, assign, slots)
        total = jnp.zeros((slots, values.shape[1]), jnp.float32)
        return total.at[place].add(values.astype(jnp.float32) * weight[:, None], mode="drop")

    # Mapped, so that the partitioner sees rows that have nothing to do with each other; indexed by row, it adds over devices.
    return jax.vmap(one)(values, assign, weight).astype(values.dtype)


def restore(values: Float[Array, "B M D"], assign: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """Rows `assign` of `values`; -1 gives zeros."""
    rows = jnp.take_along_axis(values, jnp.maximum(assign, 0)[..., None], axis=1)
    return jnp.where(assign[..., None] >= 0, rows, jnp.zeros((), values.dtype))
