# SPDX-License-Identifier: Apache-2.0
"""Running a part of a model on some rows of a batch: packed, on about as many rows as need it.

Which rows run is known on the device only, so a part is compiled for a few numbers of rows, of which one branch runs.
Shapes: B rows of a batch, R packed rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def row_rungs(rows: int) -> tuple[int, ...]:
    """Numbers of rows that a part is compiled for: none, powers of two below an eighth of all, and each eighth."""
    eighths = {math.ceil(rows * part / 8) for part in range(9)}
    return tuple(sorted(eighths | {2**power for power in range(rows.bit_length()) if 2**power < rows / 8}))


def on_rows(
    module: nn.Module, branch: Callable[[int], Callable[..., Any]], runs: Bool[Array, " B"], *operands: Any
) -> Any:
    """`branch(count)(module, runs, *operands)` for the smallest of `row_rungs` that holds the rows that run.

    Do not put it under `vmap`, which runs every branch.
    """
    rungs = row_rungs(runs.shape[0])
    rung = jnp.searchsorted(jnp.asarray(rungs), jnp.sum(runs))
    return nn.switch(rung, [branch(count) for count in rungs], module, runs, *operands)


def update_rows(
    module: nn.Module,
    part: Callable[..., Float[Array, "R ..."]],
    runs: Bool[Array, " B"],
    x: Float[Array, "B ..."],
    *others: Any,
) -> Float[Array, "B ..."]:
    """`x` with `part(module, x, *others)` in the rows that run; the others stay bit for bit.

    Args:
      part: works on each row by itself. It gets the packed rows of `x` and of every array of `others` that has axes.
    """

    def branch(count: int) -> Callable[..., Any]:
        def work(module: nn.Module, runs: Array, x: Array, *others: Any) -> Array:
            if not count:
                return x
            if count == runs.shape[0]:
                return jnp.where(_column(runs, x), part(module, x, *others), x)
            rows = jnp.argsort(~runs, stable=True)[:count]
            packed, own = x[rows], jax.tree.map(lambda leaf: leaf[rows] if jnp.ndim(leaf) else leaf, others)
            return x.at[rows].set(jnp.where(_column(runs[rows], x), part(module, packed, *own), packed))

        return work

    return on_rows(module, branch, runs, x, *others)


def _column(runs: Array, x: Array) -> Array:
    return runs.reshape(-1, *(1,) * (x.ndim - 1))
