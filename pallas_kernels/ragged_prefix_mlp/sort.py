# SPDX-License-Identifier: Apache-2.0
"""Sorting rows by a need with few values, and moving them there and back.

Shapes: R rows, K units, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def counting_sort(need: Int[Array, " R"], units: int) -> tuple[Int[Array, " R"], Int[Array, " R"], Int[Array, " K"]]:
    """Rows by falling `need [R]` in 0..`units`, ties by index: `(order [R], inverse [R], counts [K])`, all int32.

    `order[i]` is the row at place i, `inverse[r]` the place of row r, `counts[k]` how many rows need more than k units. A need
    beyond `units` counts as `units`, one below 0 as 0.

    Raises:
      ValueError: need is not a vector of integers, or there are no units, or rows times levels exceed int32.
    """
    if need.ndim != 1 or not jnp.issubdtype(need.dtype, jnp.integer) or units < 1:
        raise ValueError(
            f"need must be integers [R] with at least one unit; got {need.dtype} {need.shape}, {units} units"
        )
    rows = need.shape[0]
    if rows * (units + 1) >= 2**31:
        raise ValueError(f"{rows} rows x {units + 1} levels do not fit into int32; sort fewer rows at a time")
    index = jnp.arange(rows, dtype=jnp.int32)
    level = units - jnp.clip(need, 0, units).astype(jnp.int32)
    # Sorting plain numbers is many times faster than argsort, which carries a second operand along.
    order = jnp.sort(level * rows + index) % max(rows, 1)
    member = (level[:, None] == jnp.arange(units + 1)).astype(jnp.int32)
    running = jnp.cumsum(member, axis=0)
    total = jnp.sum(member, axis=0)
    start = jnp.cumsum(total) - total
    # Picking one column by a product with 0 and 1 spares a gather.
    inverse = jnp.sum(member * (start + running - 1), axis=1)
    return order, inverse, jnp.flip(start[1:])


@jax.custom_vjp
def permute(rows: Array, index: Int[Array, " R"], inverse: Int[Array, " R"]) -> Array:
    """Rows `index` of `rows [R, ...]`; the gradient gathers by `inverse`, where that of plain indexing would scatter."""
    return jnp.take(rows, index, axis=0)


def _forward(rows, index, inverse):
    return permute(rows, index, inverse), (index, inverse)


def _backward(saved, moved):
    index, inverse = saved
    nothing = np.zeros(index.shape, jax.dtypes.float0)
    return permute(moved, inverse, index), nothing, nothing


permute.defvjp(_forward, _backward)
